//! Plain calls of libc with errors that name the call.
//!
//! The workloads call the kernel directly, so that exactly the object under test exists and nothing that a higher
//! layer adds. `unsafe` is allowed in this program for that reason; it is a test victim and no part of Ferry.

use std::ffi::CString;
use std::path::Path;
use std::time::Duration;

/// What went wrong, for people.
pub type Fault = String;
/// The result of a setup step or a check.
pub type Verdict = Result<(), Fault>;

/// Calls a libc function that answers -1 on failure; fails with the function's name and the error.
macro_rules! sys {
    ($name:ident ( $($arg:expr),* $(,)? )) => {{
        // SAFETY: each use passes pointers to live values of the type the man page asks for, and no use hands the
        // kernel memory that Rust owns; the caller's line shows both.
        #[allow(clippy::macro_metavars_in_unsafe)]
        let answer = unsafe { libc::$name($($arg),*) };
        $crate::sys::checked(stringify!($name), $crate::sys::Answer::wide(answer))
    }};
}

/// Makes a system call by number; fails with its number's name and the error.
macro_rules! raw {
    ($name:ident $(, $arg:expr)* $(,)?) => {{
        // SAFETY: as for `sys!`.
        #[allow(clippy::macro_metavars_in_unsafe)]
        let answer = unsafe { libc::syscall(libc::$name $(, $crate::sys::Word::word($arg))*) };
        $crate::sys::checked(stringify!($name), answer)
    }};
}

/// Fails with a formatted message unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

/// Fails unless both values are equal, and shows them.
macro_rules! same {
    ($what:expr, $got:expr, $want:expr) => {{
        let (got, want) = (&$got, &$want);
        if got != want {
            return Err(format!("{}: is {:?}, was {:?}", $what, got, want));
        }
    }};
}

pub(crate) use {ensure, raw, same, sys};

/// The integer types that system calls answer with.
pub trait Answer {
    /// The answer without loss.
    fn wide(self) -> i64;
}

macro_rules! answers {
    ($($kind:ty),*) => { $(impl Answer for $kind { fn wide(self) -> i64 { self as i64 } })* };
}

answers!(i32, u32, i64, isize);

/// What a system call takes as an argument: one machine word, all of whose bits are set.
pub trait Word {
    /// The argument as the kernel sees it.
    fn word(self) -> usize;
}

macro_rules! words {
    ($($kind:ty),*) => { $(impl Word for $kind { fn word(self) -> usize { self as usize } })* };
}

words!(i32, u32, i64, u64, usize);

impl<T> Word for *const T {
    fn word(self) -> usize {
        self as usize
    }
}

impl<T> Word for *mut T {
    fn word(self) -> usize {
        self as usize
    }
}

impl<T> Word for &T {
    fn word(self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

impl<T> Word for &mut T {
    fn word(self) -> usize {
        std::ptr::from_mut(self) as usize
    }
}

/// `answer`, or the calling thread's errno as a message.
pub fn checked(name: &str, answer: i64) -> Result<i64, Fault> {
    if answer == -1 { Err(format!("{name}: {}", std::io::Error::last_os_error())) } else { Ok(answer) }
}

/// The calling thread's errno.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A value of a plain C type with every byte zero.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for C structures of integers and pointers only, for which all zero bytes is a value.
    unsafe { std::mem::zeroed() }
}

/// `path` for a system call.
pub fn c_path(path: &Path) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

/// A `timespec` of that length.
pub fn timespec(length: Duration) -> libc::timespec {
    libc::timespec { tv_sec: length.as_secs() as libc::time_t, tv_nsec: i64::from(length.subsec_nanos()) }
}

/// A clock's time (clock_gettime(2)).
pub fn clock(id: libc::clockid_t) -> Result<Duration, Fault> {
    let mut now = zeroed::<libc::timespec>();
    sys!(clock_gettime(id, &mut now))?;
    Ok(Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}

/// Sleeps a few milliseconds: the pace of every wait here.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// Waits until the condition holds, twenty seconds at most.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Verdict {
    for _ in 0..4000 {
        if condition() {
            return Ok(());
        }
        pause();
    }
    Err(format!("waited in vain for {what}"))
}

/// The text of a file of /proc, or of any file.
pub fn text(path: impl AsRef<Path>) -> Result<String, Fault> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A field of /proc/`task`/status, such as `SigBlk`.
pub fn status_field(task: &str, field: &str) -> Result<String, Fault> {
    let status = text(format!("/proc/{task}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.map(|value| value.trim().to_owned()).ok_or_else(|| format!("no {field} in /proc/{task}/status"))
}

/// Waits until the task with this id sleeps in system call `number`.
pub fn await_syscall(task: i32, number: libc::c_long) -> Verdict {
    let file = format!("/proc/{task}/syscall");
    wait_for(&format!("task {task} to sleep in system call {number}"), || {
        text(&file).is_ok_and(|line| line.split(' ').next() == Some(&number.to_string()))
    })
}

/// Bytes that differ from page to page and from place to place.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
