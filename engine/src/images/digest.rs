//! Digests of images, by which damage is noticed before it is restored.
//!
//! Records carry a SHA-256. Large plain content (pages, deleted files, archives) carries an XXH3-128 for each chunk of 1 MiB,
//! so that several threads can digest it in any order while it passes through their caches, and a reader can check
//! the chunk it uses and no other. XXH3 guards against damage, not against forgery.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

/// Length of a digested chunk; the last one of an image may be shorter.
pub const CHUNK: u64 = 1 << 20;

/// Number of chunks that content of `length` bytes has.
pub fn chunk_count(length: u64) -> u64 {
    length.div_ceil(CHUNK)
}

/// Length of chunk `index` of content of `length` bytes.
pub fn chunk_length(length: u64, index: u64) -> usize {
    length.saturating_sub(index.saturating_mul(CHUNK)).min(CHUNK) as usize
}

/// SHA-256 as lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The digest of each chunk of some content, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkDigests(Vec<u128>);

impl ChunkDigests {
    /// Number of chunks.
    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// Whether `bytes` are the whole chunk `index` as it was digested.
    pub fn verify(&self, index: u64, bytes: &[u8]) -> bool {
        let expected = usize::try_from(index).ok().and_then(|index| self.0.get(index));
        expected.is_some_and(|&expected| expected == xxh3_128(bytes))
    }

    /// Offset of the first chunk of `bytes`, the whole content, that is not as it was digested.
    pub fn first_damaged(&self, bytes: &[u8]) -> Option<u64> {
        let mut chunks = (0..).zip(bytes.chunks(CHUNK as usize));
        chunks.find(|&(index, chunk)| !self.verify(index, chunk)).map(|(index, _)| index * CHUNK)
    }
}

/// Hexadecimal, 32 digits a chunk, without separators.
impl Serialize for ChunkDigests {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(self.0.len() * 32);
        for digest in &self.0 {
            let _ = write!(text, "{digest:032x}");
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for ChunkDigests {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let malformed = || serde::de::Error::custom("chunk digests are not groups of 32 hexadecimal digits");
        if text.len() % 32 != 0 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        let digests = text.as_bytes().chunks_exact(32).map(|digits| {
            str::from_utf8(digits).ok().and_then(|digits| u128::from_str_radix(digits, 16).ok()).ok_or_else(malformed)
        });
        digests.collect::<Result<_, _>>().map(Self)
    }
}

/// Gathers the digests of chunks that several threads take in any order.
pub struct ChunkDigester {
    digests: Mutex<Vec<u128>>,
}

impl ChunkDigester {
    /// For content of `length` bytes, none of it digested yet.
    pub fn new(length: u64) -> Self {
        Self { digests: Mutex::new(vec![0; chunk_count(length) as usize]) }
    }

    /// Digests chunk `index`, whose whole content is `bytes`.
    ///
    /// # Panics
    /// If the content has no such chunk.
    pub fn record(&self, index: u64, bytes: &[u8]) {
        let digest = xxh3_128(bytes);
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)[index as usize] = digest;
    }

    /// Like [`Self::record`], for a chunk that was digested piece by piece.
    ///
    /// # Panics
    /// If the content has no such chunk.
    pub fn record_pieces(&self, index: u64, pieces: &Xxh3Default) {
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)[index as usize] = pieces.digest128();
    }

    /// The digests; call it when every chunk was recorded.
    pub fn finish(self) -> ChunkDigests {
        ChunkDigests(self.digests.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Digests content in memory.
#[cfg(test)]
pub(crate) fn digest_chunks(bytes: &[u8]) -> ChunkDigests {
    let digester = ChunkDigester::new(bytes.len() as u64);
    for (index, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
        digester.record(index as u64, chunk);
    }
    digester.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_chunk_and_no_other_is_noticed() {
        let mut bytes: Vec<u8> = (0..5 * CHUNK / 2).map(|byte| (byte * 7 % 251) as u8).collect();
        let digests = digest_chunks(&bytes);
        assert_eq!(digests.count(), 3);
        assert_eq!(chunk_length(bytes.len() as u64, 2) as u64, CHUNK / 2);
        assert_eq!(chunk_length(bytes.len() as u64, 3), 0);
        bytes[CHUNK as usize + 17] ^= 0x20;
        let good: Vec<bool> = bytes
            .chunks(CHUNK as usize)
            .enumerate()
            .map(|(index, chunk)| digests.verify(index as u64, chunk))
            .collect();
        assert_eq!(good, [true, false, true]);
        assert!(!digests.verify(3, b""), "a chunk that does not exist");
        assert!(!digests.verify(2, &bytes[2 * CHUNK as usize..][..100]), "a part of a chunk");
    }

    #[test]
    fn text_form_reads_back_and_malformed_text_is_refused() {
        let digests = digest_chunks(&[1; CHUNK as usize + 1]);
        let text = serde_json::to_string(&digests).unwrap();
        assert_eq!(text.len(), 64 + 2);
        assert_eq!(serde_json::from_str::<ChunkDigests>(&text).unwrap(), digests);
        for bad in ["\"0\"", "\"zz\"", "7", &format!("\"{}\"", "+".repeat(32)), &format!("\"{}\"", "é".repeat(16))] {
            assert!(serde_json::from_str::<ChunkDigests>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sha256_of_a_known_text() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
