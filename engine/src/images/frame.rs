//! Entries within an image: encoding, and decoding with bounds.
//!
//! Decoding never panics and never allocates by what a length claims: an entry is at most [`MAX_ENTRY`] bytes and lies within
//! the bytes at hand, an image has at most [`MAX_ENTRIES`] entries. Errors name the image and the offset.

use prost::Message;

use super::kind::Kind;

/// Largest entry that is decoded: 64 MiB. The largest that CRIU writes are `mm-PID.img` (some 60 bytes a mapping).
pub const MAX_ENTRY: usize = 64 << 20;
/// Most entries of one image that are decoded. A page run takes one, so that this is a great many runs.
pub const MAX_ENTRIES: usize = 1 << 24;
/// Most memory that the messages of one image may take, so that a flood of empty entries cannot exhaust it: 1 GiB.
const MAX_DECODED: usize = 1 << 30;

/// Why an image could not be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum DecodeError {
    /// Too short for its magic words, or they are another kind's.
    #[error(
        "image {image}: it does not begin as {kind:?} images do: not an image, damaged, or of another format version"
    )]
    Magic { image: String, kind: Kind },
    /// An entry or its tail goes on past the end.
    #[error("image {image}: truncated: at offset {offset}, {wanted} bytes should follow but only {left} are there")]
    Truncated { image: String, offset: usize, wanted: u64, left: usize },
    /// An entry is larger than any honest one.
    #[error(
        "image {image}: the entry at offset {offset} claims {claimed} bytes, more than the {MAX_ENTRY} allowed: damaged"
    )]
    TooLarge { image: String, offset: usize, claimed: u32 },
    /// There are more entries than any honest image has.
    #[error("image {image}: more entries than any real one has, at offset {offset}: damaged")]
    TooMany { image: String, offset: usize },
    /// The bytes are not the expected message.
    #[error("image {image}: the entry at offset {offset} is damaged: {source}")]
    Message { image: String, offset: usize, source: prost::DecodeError },
    /// There is no entry where one must be.
    #[error("image {image}: it has no entry, one is needed")]
    Empty { image: String },
    /// There is more than the one entry that the kind has.
    #[error("image {image}: bytes follow its only entry, at offset {offset}: damaged")]
    Surplus { image: String, offset: usize },
}

/// Encodes an image whose entries are all of one type and have no tails.
pub fn encode<M: Message>(kind: Kind, messages: &[M]) -> Vec<u8> {
    let mut encoder = Encoder::new(kind);
    for message in messages {
        encoder.entry(message);
    }
    encoder.finish()
}

/// Builds an image entry by entry; for images whose entries differ in type or have tails.
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// Begins an image of the given kind with its magic words.
    pub fn new(kind: Kind) -> Self {
        Self { bytes: kind.magic() }
    }

    /// Appends a message with its length.
    ///
    /// # Panics
    /// If the message is longer than 4 GiB, which no record of a kernel object is.
    pub fn entry<M: Message>(&mut self, message: &M) -> &mut Self {
        let length = u32::try_from(message.encoded_len()).expect("a record is shorter than 4 GiB");
        self.bytes.reserve(length as usize + 4);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        message.encode_raw(&mut self.bytes);
        self
    }

    /// Appends plain bytes: the tail of the entry before. Padding, where the kind has it, is the caller's.
    pub fn tail(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The image.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads an image entry by entry, from bytes in memory.
pub struct Reader<'a> {
    image: &'a str,
    bytes: &'a [u8],
    offset: usize,
    entries: usize,
}

impl<'a> Reader<'a> {
    /// Begins to read the image called `image`, whose magic words must be those of `kind`.
    ///
    /// The bytes may be the beginning of a larger image, to read the head of one whose tail is large.
    ///
    /// # Errors
    /// [`DecodeError::Magic`].
    pub fn new(image: &'a str, kind: Kind, bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let magic = kind.magic();
        if !bytes.starts_with(&magic) {
            return Err(DecodeError::Magic { image: image.to_owned(), kind });
        }
        Ok(Self { image, bytes, offset: magic.len(), entries: 0 })
    }

    /// Offset of the next entry or tail within the image.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether all bytes are read.
    pub fn at_end(&self) -> bool {
        self.offset == self.bytes.len()
    }

    /// The next entry, or `None` at the end.
    ///
    /// # Errors
    /// Every [`DecodeError`] but `Magic`, `Empty` and `Surplus`.
    pub fn next_entry<M: Message + Default>(&mut self) -> Result<Option<M>, DecodeError> {
        Ok(self.next_with_bytes()?.map(|(message, _)| message))
    }

    /// The next entry and the bytes it was decoded from, or `None` at the end.
    pub(super) fn next_with_bytes<M: Message + Default>(&mut self) -> Result<Option<(M, &'a [u8])>, DecodeError> {
        if self.at_end() {
            return Ok(None);
        }
        let offset = self.offset;
        let mut length = [0; 4];
        length.copy_from_slice(self.tail(4)?);
        let claimed = u32::from_le_bytes(length);
        if claimed as usize > MAX_ENTRY {
            return Err(DecodeError::TooLarge { image: self.image.to_owned(), offset, claimed });
        }
        if self.entries >= MAX_ENTRIES.min(MAX_DECODED / size_of::<M>().max(1)) {
            return Err(DecodeError::TooMany { image: self.image.to_owned(), offset });
        }
        self.entries += 1;
        let bytes = self.tail(u64::from(claimed))?;
        match M::decode(bytes) {
            Ok(message) => Ok(Some((message, bytes))),
            Err(source) => Err(DecodeError::Message { image: self.image.to_owned(), offset, source }),
        }
    }

    /// The next entry, which must be there.
    ///
    /// # Errors
    /// As [`Reader::next_entry`], and [`DecodeError::Empty`] at the end.
    pub fn expect_entry<M: Message + Default>(&mut self) -> Result<M, DecodeError> {
        self.next_entry()?.ok_or_else(|| self.empty())
    }

    /// The error for an entry that must be there and is not.
    pub(super) fn empty(&self) -> DecodeError {
        DecodeError::Empty { image: self.image.to_owned() }
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// [`DecodeError::Surplus`].
    pub fn expect_end(&self) -> Result<(), DecodeError> {
        let surplus = || DecodeError::Surplus { image: self.image.to_owned(), offset: self.offset };
        if self.at_end() { Ok(()) } else { Err(surplus()) }
    }

    /// The next `length` bytes: the tail of the entry before.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn tail(&mut self, length: u64) -> Result<&'a [u8], DecodeError> {
        let rest = &self.bytes[self.offset..];
        match usize::try_from(length).ok().and_then(|length| rest.get(..length)) {
            Some(tail) => {
                self.offset += tail.len();
                Ok(tail)
            }
            None => Err(DecodeError::Truncated {
                image: self.image.to_owned(),
                offset: self.offset,
                wanted: length,
                left: rest.len(),
            }),
        }
    }

    /// All bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.offset..];
        self.offset = self.bytes.len();
        rest
    }
}

/// Decodes an image whose entries are all of one type and have no tails.
///
/// # Errors
/// Every [`DecodeError`] but `Empty` and `Surplus`.
pub fn decode_all<M: Message + Default>(image: &str, kind: Kind, bytes: &[u8]) -> Result<Vec<M>, DecodeError> {
    let mut reader = Reader::new(image, kind, bytes)?;
    let mut messages = Vec::new();
    while let Some(message) = reader.next_entry()? {
        messages.push(message);
    }
    Ok(messages)
}

/// Decodes an image of exactly one entry without a tail.
///
/// # Errors
/// Every [`DecodeError`].
pub fn decode_one<M: Message + Default>(image: &str, kind: Kind, bytes: &[u8]) -> Result<M, DecodeError> {
    let mut reader = Reader::new(image, kind, bytes)?;
    let message = reader.expect_entry()?;
    reader.expect_end()?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::super::pipe::PipeDataEntry;
    use super::super::pstree::PstreeEntry;
    use super::*;

    const NAME: &str = "pstree.img";

    fn tree() -> Vec<PstreeEntry> {
        (1..4).map(|pid| PstreeEntry { pid, ppid: pid - 1, pgid: 1, sid: 1, threads: vec![pid, pid + 100] }).collect()
    }

    #[test]
    fn bytes_are_those_of_the_format() {
        let image = encode(Kind::Pstree, &tree()[..1]);
        // Magic words, length, then fields 1 to 5 as varints; repeated numbers are not packed.
        let expected =
            [0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50, 12, 0, 0, 0, 8, 1, 16, 0, 24, 1, 32, 1, 40, 1, 40, 101];
        assert_eq!(image, expected);
    }

    #[test]
    fn messages_survive_a_round_trip() {
        let image = encode(Kind::Pstree, &tree());
        assert_eq!(decode_all::<PstreeEntry>(NAME, Kind::Pstree, &image).unwrap(), tree());
        let none = encode::<PstreeEntry>(Kind::Pstree, &[]);
        assert_eq!(decode_all::<PstreeEntry>(NAME, Kind::Pstree, &none).unwrap(), []);
    }

    #[test]
    fn tails_follow_their_entries() {
        let mut encoder = Encoder::new(Kind::PipesData);
        for (pipe_id, content) in [(1, &b"abc"[..]), (2, b""), (3, b"de")] {
            encoder.entry(&PipeDataEntry { pipe_id, bytes: content.len() as u32, size: Some(65536) }).tail(content);
        }
        let image = encoder.finish();
        let mut reader = Reader::new("pipes-data.img", Kind::PipesData, &image).unwrap();
        let mut seen = Vec::new();
        while let Some(entry) = reader.next_entry::<PipeDataEntry>().unwrap() {
            seen.push((entry.pipe_id, reader.tail(entry.bytes.into()).unwrap().to_vec()));
        }
        assert_eq!(seen, [(1, b"abc".to_vec()), (2, vec![]), (3, b"de".to_vec())]);
    }

    #[test]
    fn every_truncation_is_an_error_or_fewer_whole_entries() {
        let image = encode(Kind::Pstree, &tree());
        let mut whole = 0;
        for length in 0..image.len() {
            match decode_all::<PstreeEntry>(NAME, Kind::Pstree, &image[..length]) {
                Ok(messages) => {
                    assert_eq!(messages, tree()[..messages.len()], "cut at {length}");
                    whole += 1;
                }
                Err(error) => assert!(error.to_string().contains(NAME), "{error}"),
            }
        }
        assert_eq!(whole, 3, "cuts at an entry's end");
    }

    #[test]
    fn false_lengths_are_errors_without_allocation() {
        let mut image = Kind::Pstree.magic();
        image.extend_from_slice(&(MAX_ENTRY as u32 + 1).to_le_bytes());
        let error = decode_all::<PstreeEntry>(NAME, Kind::Pstree, &image).unwrap_err();
        assert!(matches!(error, DecodeError::TooLarge { offset: 8, .. }), "{error}");

        let mut image = Kind::Pstree.magic();
        image.extend_from_slice(&(MAX_ENTRY as u32).to_le_bytes());
        let error = decode_all::<PstreeEntry>(NAME, Kind::Pstree, &image).unwrap_err();
        assert!(matches!(error, DecodeError::Truncated { offset: 12, left: 0, .. }), "{error}");
    }

    #[test]
    fn one_entry_means_one() {
        let image = encode(Kind::Pstree, &tree()[..1]);
        assert_eq!(decode_one::<PstreeEntry>(NAME, Kind::Pstree, &image).unwrap(), tree()[0]);
        let two = encode(Kind::Pstree, &tree()[..2]);
        assert!(matches!(
            decode_one::<PstreeEntry>(NAME, Kind::Pstree, &two),
            Err(DecodeError::Surplus { offset: 24, .. })
        ));
        let none = encode::<PstreeEntry>(Kind::Pstree, &[]);
        assert!(matches!(decode_one::<PstreeEntry>(NAME, Kind::Pstree, &none), Err(DecodeError::Empty { .. })));
        assert!(matches!(decode_one::<PstreeEntry>(NAME, Kind::Core, &image), Err(DecodeError::Magic { .. })));
    }
}
