//! Settings under `/proc/sys`, which shows the namespaces of the thread that opens it (proc_sys(5)).
//!
//! A setting is read by one read(2): the kernel ends the file after the first, however little that asked for.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

/// No value of a setting that is saved is longer, as text.
pub(super) const LONGEST: usize = 256;

/// A folder of settings: each costs three system calls, and looking up one name.
pub(super) struct Folder {
    name: String,
    /// None when this kernel lacks it, and so all of its settings.
    open: Option<OwnedFd>,
}

impl Folder {
    /// Opens `/proc/sys/NAME`.
    pub fn open(name: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let name = name.to_owned();
        match openat(CWD, format!("/proc/sys/{name}"), flags, Mode::empty()) {
            Ok(open) => Ok(Self { name, open: Some(open) }),
            Err(Errno::NOENT) => Ok(Self { name, open: None }),
            Err(error) => Err(error.into()),
        }
    }

    /// The value as text; none when this kernel lacks the setting.
    pub fn get(&self, setting: &str) -> io::Result<Option<String>> {
        let Some(open) = &self.open else { return Ok(None) };
        let mut text = [0; LONGEST];
        let read = openat(open, setting, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::read(file, &mut text));
        match read {
            Ok(length) => Ok(Some(String::from_utf8_lossy(&text[..length]).trim_end().to_owned())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("read", setting, error)),
        }
    }

    /// The value as a number; none when this kernel lacks the setting.
    pub fn number<T: std::str::FromStr>(&self, setting: &str) -> io::Result<Option<T>> {
        let malformed = |text| io::Error::new(io::ErrorKind::InvalidData, format!("{}/{setting}: {text:?}", self.name));
        self.get(setting)?.map(|text| text.parse().map_err(|_| malformed(text))).transpose()
    }

    /// Sets the value, unless it is that already. What this kernel lacks cannot matter to it.
    pub fn set_changed(&self, setting: &str, value: &str) -> io::Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        // Some cannot be read before they are set.
        let current = self.get(setting).unwrap_or_default().unwrap_or_default();
        if current.split_ascii_whitespace().eq(value.split_ascii_whitespace()) {
            return Ok(());
        }
        let written = openat(open, setting, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::write(file, value.as_bytes()));
        match written {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed(&format!("set to {value}"), setting, error)),
        }
    }

    fn failed(&self, what: &str, setting: &str, error: Errno) -> io::Error {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("cannot {what}: {}/{setting}: {error}", self.name))
    }
}
