//! Work on memory by several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Below this, more threads cost more than they gain.
pub const WORTH_THREADS: u64 = 4 << 20;

/// Runs `work` on every item, with as many threads as there are processors (four at most) when there are `bytes` enough; the first
/// error ends it. Each thread has a state of its own.
///
/// # Errors
/// One of those that `work` returned.
pub fn in_parallel<T: Sync, S, E: Send>(
    bytes: u64,
    items: &[T],
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let threads = if bytes < WORTH_THREADS { 1 } else { processors.min(items.len()) };
    if threads <= 1 {
        let mut state = state();
        return items.iter().try_for_each(|item| work(&mut state, item));
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let run = || {
        let mut state = state();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(&mut state, item) {
                next.store(items.len(), Ordering::Relaxed);
                failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_items_are_done_by_all_threads_and_an_error_is_told() {
        let done = AtomicUsize::new(0);
        let items: Vec<u64> = (0..100).collect();
        let count = |_: &mut (), _: &u64| {
            done.fetch_add(1, Ordering::Relaxed);
            Ok::<_, u64>(())
        };
        in_parallel(WORTH_THREADS, &items, || (), count).unwrap();
        assert_eq!(done.into_inner(), 100);
        let fail = |_: &mut (), item: &u64| if *item == 50 { Err(*item) } else { Ok(()) };
        assert_eq!(in_parallel(WORTH_THREADS, &items, || (), fail), Err(50));
    }
}
