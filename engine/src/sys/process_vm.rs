//! process_vm_readv(2) and process_vm_writev(2).
#![allow(unsafe_code)]

use std::ops::Range;

use super::{HostPid, check};

/// The most ranges that one call takes (`UIO_MAXIOV`).
pub const MAX_RANGES: usize = 1024;

fn remote(ranges: &[Range<u64>]) -> Vec<libc::iovec> {
    ranges
        .iter()
        .map(|range| libc::iovec { iov_base: range.start as *mut _, iov_len: (range.end - range.start) as usize })
        .collect()
}

/// Reads `ranges` of the task's memory, one after the other, into `buffer`; returns how many bytes came.
///
/// A short count means that the byte after it could not be read.
pub fn read(pid: HostPid, ranges: &[Range<u64>], buffer: &mut [u8]) -> nix::Result<usize> {
    let remote = remote(&ranges[..ranges.len().min(MAX_RANGES)]);
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the local vector covers `buffer` exactly, and remote addresses are only used in the other task.
    let got = unsafe { libc::process_vm_readv(pid.0, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    check(got as i64).map(|got| got as usize)
}

/// Writes `data` over `ranges` of the task's memory, one after the other; returns how many bytes went.
pub fn write(pid: HostPid, ranges: &[Range<u64>], data: &[u8]) -> nix::Result<usize> {
    let remote = remote(&ranges[..ranges.len().min(MAX_RANGES)]);
    let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: the local vector covers `data` exactly and is only read.
    let put = unsafe { libc::process_vm_writev(pid.0, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    check(put as i64).map(|put| put as usize)
}

/// Writes each slice at its address in the task, at most [`MAX_RANGES`] of them; returns how many bytes went.
///
/// A short count means that the byte after it could not be written.
pub fn write_pieces(pid: HostPid, pieces: &[(u64, &[u8])]) -> nix::Result<usize> {
    let pieces = &pieces[..pieces.len().min(MAX_RANGES)];
    let vector = |base: fn(&(u64, &[u8])) -> *mut libc::c_void| -> Vec<libc::iovec> {
        pieces.iter().map(|piece| libc::iovec { iov_base: base(piece), iov_len: piece.1.len() }).collect()
    };
    let local = vector(|piece| piece.1.as_ptr().cast_mut().cast());
    let remote = vector(|piece| piece.0 as *mut _);
    let count = pieces.len() as u64;
    // SAFETY: the local vectors cover the slices exactly and are only read; remote addresses are used in the other task.
    let put = unsafe { libc::process_vm_writev(pid.0, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    check(put as i64).map(|put| put as usize)
}
