//! The common character devices (null(4), random(4), full(4)).

use crate::filesystem::open;
use crate::room::{Check, Room};
use crate::sys::{Fault, ensure, errno, same, sys, zeroed};
use std::path::Path;

/// Descriptors of /dev/null, zero, full, random and urandom: they are the same devices and behave so.
pub fn devices(_: &Room) -> Result<Check, Fault> {
    let names = ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random"];
    let all: Vec<i32> = names.into_iter().map(|name| open(Path::new(name), libc::O_RDWR)).collect::<Result<_, _>>()?;
    Ok(Box::new(move || {
        let mut bytes = [1u8; 64];
        same!("bytes of /dev/null", sys!(read(all[0], bytes.as_mut_ptr().cast(), 64))?, 0);
        same!("bytes of /dev/zero", sys!(read(all[1], bytes.as_mut_ptr().cast(), 64))?, 64);
        same!("content of /dev/zero", bytes, [0u8; 64]);
        let written = sys!(write(all[2], bytes.as_ptr().cast(), 1));
        ensure!(written.is_err() && errno() == libc::ENOSPC, "/dev/full takes bytes");
        for random in &all[3..] {
            sys!(read(*random, bytes.as_mut_ptr().cast(), 64))?;
            ensure!(bytes != [0u8; 64], "random bytes are all zero");
        }
        for (descriptor, minor) in all.iter().zip([3, 5, 7, 9, 8]) {
            let mut stat = zeroed::<libc::stat>();
            sys!(fstat(*descriptor, &mut stat))?;
            same!("device number", (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)), (1, minor));
        }
        Ok(())
    }))
}
