//! `/proc/PID/fdinfo/FD` (proc_pid_fdinfo(5)): what every descriptor has, and the lines of its kind.

/// `FD_CLOEXEC` is shown among the status flags (fs/proc/fd.c) and belongs to the descriptor.
pub const O_CLOEXEC: u32 = libc::O_CLOEXEC as u32;

/// What one file of `/proc/PID/fdinfo` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdInfo<'a> {
    /// Offset of the description.
    pub pos: u64,
    /// Status flags and access mode of the description, without `O_CLOEXEC`.
    pub flags: u32,
    /// Whether this descriptor is closed by execve(2).
    pub cloexec: bool,
    /// The mount it was opened on.
    pub mnt_id: i32,
    /// The lines that only its kind of object has.
    pub body: &'a str,
}

impl<'a> FdInfo<'a> {
    /// Parses the text; none if the kernel wrote something else.
    pub fn parse(text: &'a str) -> Option<Self> {
        let mut info = Self { pos: 0, flags: 0, cloexec: false, mnt_id: -1, body: "" };
        let mut rest = text;
        let mut seen = 0;
        while let Some((line, after)) = rest.split_once('\n') {
            let Some((key, value)) = line.split_once(":\t") else { break };
            match key {
                "pos" => info.pos = value.trim().parse::<i64>().ok()? as u64,
                "flags" => {
                    let flags = u32::from_str_radix(value, 8).ok()?;
                    info.flags = flags & !O_CLOEXEC;
                    info.cloexec = flags & O_CLOEXEC != 0;
                }
                "mnt_id" => info.mnt_id = value.trim().parse().ok()?,
                // Linux 5.14 and later.
                "ino" => {}
                _ => break,
            }
            seen += 1;
            rest = after;
        }
        info.body = rest;
        (seen >= 3).then_some(info)
    }

    /// The value of the first line `key: value` of the body, spaces around it removed.
    pub fn field(&self, key: &str) -> Option<&'a str> {
        self.body.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
    }

    /// The file locks that the kernel ascribes to this descriptor.
    pub fn locks(&self) -> impl Iterator<Item = &'a str> {
        self.body.lines().filter_map(|line| line.strip_prefix("lock:")).map(str::trim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_fields_and_body_are_told_apart() {
        let text =
            "pos:\t5\nflags:\t02100002\nmnt_id:\t16\nino:\t1061\neventfd-count:                3\neventfd-id: 7\n";
        let info = FdInfo::parse(text).expect("parses");
        assert_eq!((info.pos, info.flags, info.cloexec, info.mnt_id), (5, 0o100002, true, 16));
        assert_eq!(info.field("eventfd-count"), Some("3"));
        assert_eq!(info.field("eventfd"), None);
    }

    #[test]
    fn locks_are_found() {
        let text = "pos:\t0\nflags:\t0100002\nmnt_id:\t9\nino:\t3\nlock:\t1: POSIX  ADVISORY  WRITE 7 00:1d:3 0 EOF\n";
        let info = FdInfo::parse(text).expect("parses");
        assert_eq!(info.locks().collect::<Vec<_>>(), ["1: POSIX  ADVISORY  WRITE 7 00:1d:3 0 EOF"]);
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "pos:\t1\n", "pos:\tx\nflags:\t0\nmnt_id:\t1\n", "pos:\t0\nflags:\t9\nmnt_id:\t1\n"] {
            assert_eq!(FdInfo::parse(text), None, "{text:?}");
        }
    }
}
