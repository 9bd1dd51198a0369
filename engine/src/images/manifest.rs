//! `ferry.json`: what made the image set, what it needs, and the digest of every image.
//!
//! It is written last, so that a set with one is complete, and it ends with the SHA-256 of all that comes before, so that
//! damage to the file itself is noticed. A set without one was made by CRIU and cannot be verified.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::digest::{ChunkDigests, chunk_count, sha256};
use super::elsewhere::PagesElsewhere;

/// Name of the file.
pub const MANIFEST_NAME: &str = "ferry.json";
/// Version of the manifest's format and of ferry's additions to the image set, up to which this crate reads.
pub const FORMAT_VERSION: u32 = 2;
/// The version of sets that hold all of their pages. Others have [`FORMAT_VERSION`], since older versions would not look for them.
const FORMAT_WITH_PAGES: u32 = 1;

/// Length and digest of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDigest {
    /// Bytes.
    pub length: u64,
    /// Over all of them.
    #[serde(flatten)]
    pub digest: Digest,
}

/// How an image is digested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Digest {
    /// SHA-256 in hexadecimal: records.
    #[serde(rename = "sha256")]
    Sha256(String),
    /// XXH3-128 of each chunk of 1 MiB: large plain content.
    #[serde(rename = "xxh3-128-1m")]
    Chunks(ChunkDigests),
}

/// The content of `ferry.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer.
    pub format: u32,
    /// Version of ferry that wrote the set.
    pub ferry: String,
    /// Machine, as `uname -m` says it.
    pub architecture: String,
    /// Kernel release, as `uname -r` says it.
    pub kernel: String,
    /// Bytes of a page.
    pub page_size: u32,
    /// Processor features in use, as `/proc/cpuinfo` names them; the target must have them all.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// What identifies the vdso that was mapped: its build id or digest.
    #[serde(default)]
    pub vdso: Option<String>,
    /// Options of the dump that a restore must know.
    #[serde(default)]
    pub options: serde_json::Map<String, serde_json::Value>,
    /// Every image of the set, by name. Filled in by the sink.
    #[serde(default)]
    pub images: BTreeMap<String, ImageDigest>,
    /// Pagemaps whose pages were sent to a page server, by their image's name; its folder has both images. Filled in by the sink.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub elsewhere: BTreeMap<String, PagesElsewhere>,
    /// Archive members beside the images, by name, as far as they were written before the manifest. Filled in by the sink.
    #[serde(default)]
    pub members: BTreeMap<String, ImageDigest>,
}

/// Why a manifest is not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum ManifestError {
    /// Its own digest does not match, or it has none.
    #[error("{MANIFEST_NAME} is damaged: it does not match its own digest")]
    Damaged,
    /// Whole, but not what this version writes.
    #[error("{MANIFEST_NAME} cannot be understood: {source}")]
    Malformed { source: serde_json::Error },
    /// Written by a newer ferry.
    #[error(
        "the images have format version {found}, this ferry reads up to {FORMAT_VERSION}: restore them with ferry {ferry} or newer"
    )]
    Newer { found: u32, ferry: String },
    /// Made on another kind of machine.
    #[error("the images were made on {found}, this machine is {here}: processes cannot move between architectures")]
    Architecture { found: String, here: String },
}

/// Between the manifest proper and its digest. The digest and [`END`] follow.
const SEAL: &str = ",\n  \"sha256\": \"";
const END: &str = "\"\n}\n";
const SEAL_LENGTH: usize = SEAL.len() + 64 + END.len();

impl Manifest {
    /// A manifest of this version of ferry, for this machine, without images.
    pub fn new(kernel: impl Into<String>, page_size: u32) -> Self {
        Self {
            format: FORMAT_WITH_PAGES,
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            architecture: std::env::consts::ARCH.to_owned(),
            kernel: kernel.into(),
            page_size,
            cpu_features: Vec::new(),
            vdso: None,
            options: serde_json::Map::new(),
            images: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            members: BTreeMap::new(),
        }
    }

    /// Says of which pages a page server has.
    pub fn set_elsewhere(&mut self, pages: BTreeMap<String, PagesElsewhere>) {
        self.format = if pages.is_empty() { FORMAT_WITH_PAGES } else { FORMAT_VERSION };
        self.elsewhere = pages;
    }

    /// The file's content: indented JSON whose last member is the digest of all before it.
    ///
    /// # Errors
    /// [`ManifestError::Malformed`] if the options cannot be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let malformed = |source| ManifestError::Malformed { source };
        let mut text = serde_json::to_string_pretty(self).map_err(malformed)?;
        text.truncate(text.len() - "\n}".len());
        let digest = sha256(text.as_bytes());
        text.extend([SEAL, &digest, END]);
        Ok(text.into_bytes())
    }

    /// The SHA-256 of the file's content, which tells the set from any other.
    ///
    /// # Errors
    /// As [`Self::to_bytes`].
    pub fn digest(&self) -> Result<String, ManifestError> {
        self.to_bytes().map(|bytes| sha256(&bytes))
    }

    /// Reads the file's content. The version is looked at first, so that a newer file is called newer and not damaged.
    ///
    /// # Errors
    /// Every [`ManifestError`] but `Architecture`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
            #[serde(default)]
            ferry: String,
        }
        let version = serde_json::from_slice::<Version>(bytes).map_err(|_| ManifestError::Damaged)?;
        if version.format > FORMAT_VERSION {
            return Err(ManifestError::Newer { found: version.format, ferry: version.ferry });
        }
        let (content, seal) =
            bytes.split_at_checked(bytes.len().wrapping_sub(SEAL_LENGTH)).ok_or(ManifestError::Damaged)?;
        if seal != [SEAL, &sha256(content), END].concat().as_bytes() {
            return Err(ManifestError::Damaged);
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|source| ManifestError::Malformed { source })?;
        let whole = |image: &ImageDigest| match &image.digest {
            Digest::Sha256(digest) => digest.len() == 64,
            Digest::Chunks(digests) => digests.count() == chunk_count(image.length),
        };
        let elsewhere = manifest.elsewhere.values().map(|sent| &sent.pages);
        if manifest.images.values().chain(manifest.members.values()).chain(elsewhere).all(whole) {
            Ok(manifest)
        } else {
            Err(ManifestError::Damaged)
        }
    }

    /// Checks that the set is for this kind of machine.
    ///
    /// # Errors
    /// [`ManifestError::Architecture`].
    pub fn check_architecture(&self) -> Result<(), ManifestError> {
        if self.architecture == std::env::consts::ARCH {
            return Ok(());
        }
        Err(ManifestError::Architecture { found: self.architecture.clone(), here: std::env::consts::ARCH.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::digest::digest_chunks;
    use super::*;

    fn manifest() -> Manifest {
        let mut manifest = Manifest::new("6.18.0", 4096);
        manifest.cpu_features = vec!["avx2".into()];
        manifest.options.insert("leave_running".into(), true.into());
        let record = ImageDigest { length: 3, digest: Digest::Sha256(sha256(b"abc")) };
        manifest.images.insert("core-1.img".into(), record);
        let pages = ImageDigest { length: 2, digest: Digest::Chunks(digest_chunks(b"ab")) };
        manifest.images.insert("pages-1.img".into(), pages);
        manifest
    }

    #[test]
    fn reads_back_and_is_plain_json() {
        let bytes = manifest().to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest());
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["images"]["core-1.img"]["length"], 3);
        assert_eq!(json["sha256"].as_str().map(str::len), Some(64));
        manifest().check_architecture().unwrap();
    }

    #[test]
    fn any_flipped_bit_and_any_truncation_is_an_error() {
        let bytes = manifest().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(Manifest::from_bytes(&bytes[..length]).is_err(), "cut at {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::from_bytes(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn newer_and_foreign_sets_are_named_so() {
        let mut newer = manifest();
        newer.format = FORMAT_VERSION + 1;
        let error = Manifest::from_bytes(&newer.to_bytes().unwrap()).unwrap_err();
        assert!(matches!(error, ManifestError::Newer { found: 3, .. }), "{error}");
        let mut foreign = manifest();
        foreign.architecture = "s390x".into();
        let foreign = Manifest::from_bytes(&foreign.to_bytes().unwrap()).unwrap();
        assert!(foreign.check_architecture().unwrap_err().to_string().contains("s390x"));
    }

    #[test]
    fn digests_that_do_not_fit_the_length_are_refused() {
        let mut false_length = manifest();
        false_length.images.get_mut("pages-1.img").unwrap().length = u64::MAX;
        assert!(matches!(Manifest::from_bytes(&false_length.to_bytes().unwrap()), Err(ManifestError::Damaged)));
    }
}
