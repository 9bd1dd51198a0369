//! Locks that processes share through memory (futex(2)).

use crate::memory::{READ_WRITE, SHARED, map};
use crate::room::{Check, Room};
use crate::sys::{Fault, same, sys, zeroed};

/// A mutex in shared memory that a child holds: the parent cannot take it until the child lets go.
pub fn futex_between_processes(room: &Room) -> Result<Check, Fault> {
    let lock = map(4096, READ_WRITE, SHARED)? as *mut libc::pthread_mutex_t;
    let mut attributes = zeroed::<libc::pthread_mutexattr_t>();
    sys!(pthread_mutexattr_init(&mut attributes))?;
    sys!(pthread_mutexattr_setpshared(&mut attributes, libc::PTHREAD_PROCESS_SHARED))?;
    sys!(pthread_mutex_init(lock, &attributes))?;
    let mut held = false;
    let child = room.child("holder", move |_| {
        Ok(Box::new(move || {
            // Asked in turn: take it, let it go, take it …
            let answer = if held { sys!(pthread_mutex_unlock(lock))? } else { sys!(pthread_mutex_lock(lock))? };
            held = !held;
            same!("answer of the lock", answer, 0);
            Ok(())
        }))
    })?;
    Ok(Box::new(move || {
        same!("answer of the lock that the child holds", sys!(pthread_mutex_trylock(lock))?, i64::from(libc::EBUSY));
        child.ask()?;
        same!("answer of the free lock", sys!(pthread_mutex_trylock(lock))?, 0);
        sys!(pthread_mutex_unlock(lock))?;
        child.ask()
    }))
}
