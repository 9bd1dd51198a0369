//! The page server's protocol, byte for byte as CRIU 4.2 speaks it.
//!
//! Each side sends headers of 32 bytes; some are followed by pages, some are answered:
//!
//! | bytes | |
//! | --- | --- |
//! | 0–3 | command in the lower half, page flags in the upper |
//! | 4–7 | padding of the C structure, of any value |
//! | 8–15 | number of pages |
//! | 16–23 | address, or offset in a shared object, of the first |
//! | 24–31 | whose pages: a number, and in the lowest byte of what (1 process, 2 shared object); for `GET` the bare pid |
//!
//! All numbers are little-endian: both ends are x86-64. Pages follow an *add* that says them to be present, and nothing else. What
//! is answered, and how, [`Command`] says. Both ends are hostile input to each other: what is decoded here lies within memory as x86-64
//! has it, and counts no more pages than that.

use std::io::{self, Read};
use std::ops::Range;

use crate::images::Kind;
use crate::images::pagemap::page_flags;
use crate::memory::layout::ADDRESS_END;
use crate::sys::PAGE_SIZE;

/// Bytes of a header.
pub const HEADER: usize = 32;

/// Answer to [`Command::Close`] and [`Command::ForceClose`]: all that was sent has been taken (a status of 32 bits).
pub const TAKEN: [u8; 4] = [0; 4];

const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;

const COMMAND_BITS: u32 = 16;
const KIND_BITS: u32 = 8;
const OF_PROCESS: u64 = 1;
const OF_SHARED: u64 = 2;

/// Whose pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A process, by the pid that its images have.
    Process(u32),
    /// A shared memory object, by its id, of at most 56 bits.
    Shared(u64),
}

impl Object {
    /// The kind of its pagemap image, and that image's number.
    pub fn image(self) -> (Kind, u64) {
        match self {
            Self::Process(pid) => (Kind::Pagemap, pid.into()),
            Self::Shared(id) => (Kind::ShmemPagemap, id),
        }
    }

    /// The object whose pagemap image is of this kind and number.
    pub fn of_image(kind: Kind, number: u64) -> Option<Self> {
        match kind {
            Kind::Pagemap => u32::try_from(number).ok().map(Self::Process),
            Kind::ShmemPagemap if number < 1 << (u64::BITS - KIND_BITS) => Some(Self::Shared(number)),
            _ => None,
        }
    }

    fn to_wire(self) -> u64 {
        match self {
            Self::Process(pid) => u64::from(pid) << KIND_BITS | OF_PROCESS,
            Self::Shared(id) => id << KIND_BITS | OF_SHARED,
        }
    }

    fn from_wire(wire: u64) -> Result<Self, ProtocolError> {
        let number = wire >> KIND_BITS;
        match wire & ((1 << KIND_BITS) - 1) {
            OF_PROCESS => pid(number).map(Self::Process),
            OF_SHARED => Ok(Self::Shared(number)),
            kind => Err(ProtocolError::Object { kind }),
        }
    }
}

fn pid(number: u64) -> Result<u32, ProtocolError> {
    u32::try_from(number)
        .ok()
        .filter(|pid| (1..=i32::MAX as u32).contains(pid))
        .ok_or(ProtocolError::Pid { pid: number })
}

/// Pages that follow one another: at least one, all within memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    start: u64,
    count: u64,
}

impl Pages {
    /// `count` pages from the address or offset `start` on.
    ///
    /// # Errors
    /// [`ProtocolError::Pages`], if there can be no such pages.
    pub fn new(start: u64, count: u64) -> Result<Self, ProtocolError> {
        let end = count.checked_mul(PAGE_SIZE).and_then(|bytes| start.checked_add(bytes));
        if count == 0 || !start.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > ADDRESS_END) {
            return Err(ProtocolError::Pages { start, count });
        }
        Ok(Self { start, count })
    }

    /// The address or offset of the first.
    pub fn start(self) -> u64 {
        self.start
    }

    /// How many they are.
    pub fn count(self) -> u64 {
        self.count
    }

    /// How many bytes they have.
    pub fn bytes(self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// Where they are.
    pub fn range(self) -> Range<u64> {
        self.start..self.start + self.bytes()
    }
}

/// What one side asks of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The adds that follow are of this object. `answered`: the server sends one byte, 1 if its parent images have pages of the object
    /// and 0 otherwise.
    Open {
        /// Whose.
        object: Object,
        /// Whether an answer is awaited.
        answered: bool,
    },
    /// Whether the server's parent images have pages of this object: 32 bits, 1 or 0.
    HasParent {
        /// Whose.
        object: Object,
    },
    /// A run of the pagemap. The pages follow if [`page_flags::PRESENT`] is among the flags; no answer.
    Add {
        /// Whose.
        object: Object,
        /// Which.
        pages: Pages,
        /// [`page_flags`].
        flags: u32,
    },
    /// Asks for pages, perhaps fewer: the answer is [`GotPages`].
    Get {
        /// The process, by the pid that its images have.
        pid: u32,
        /// Which.
        pages: Pages,
    },
    /// That was all; the server answers [`TAKEN`], and whoever connected closes.
    Close,
    /// The same from a peer whose connection others hold open too.
    ForceClose,
}

impl Command {
    /// The header.
    pub fn encode(self) -> [u8; HEADER] {
        match self {
            Self::Open { object, answered } => header(if answered { OPEN2 } else { OPEN }, 0, None, object.to_wire()),
            Self::HasParent { object } => header(PARENT, 0, None, object.to_wire()),
            Self::Add { object, pages, flags } => header(ADD_F, flags, Some(pages), object.to_wire()),
            Self::Get { pid, pages } => header(GET, 0, Some(pages), pid.into()),
            Self::Close => header(CLOSE, 0, None, 0),
            Self::ForceClose => header(FORCE_CLOSE, 0, None, 0),
        }
    }

    /// What a header says.
    ///
    /// # Errors
    /// [`ProtocolError`], if it is none that CRIU or ferry would send.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, ProtocolError> {
        let Fields { command, flags, start, count, object } = Fields::of(bytes);
        let pages = || Pages::new(start, count);
        Ok(match command {
            OPEN | OPEN2 => Self::Open { object: Object::from_wire(object)?, answered: command == OPEN2 },
            PARENT => Self::HasParent { object: Object::from_wire(object)? },
            ADD => Self::Add { object: Object::from_wire(object)?, pages: pages()?, flags: page_flags::PRESENT },
            HOLE => Self::Add { object: Object::from_wire(object)?, pages: pages()?, flags: page_flags::PARENT },
            ADD_F => Self::Add { object: Object::from_wire(object)?, pages: pages()?, flags: known(flags)? },
            GET => Self::Get { pid: pid(object)?, pages: pages()? },
            CLOSE => Self::Close,
            FORCE_CLOSE => Self::ForceClose,
            command => return Err(ProtocolError::Command { command }),
        })
    }
}

/// The header of the answer to [`Command::Get`]; the pages follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GotPages {
    /// Whose.
    pub pid: u32,
    /// Which: those asked for, or the first of them. `None` if there are none at the address.
    pub pages: Option<Pages>,
}

impl GotPages {
    /// The header.
    pub fn encode(self) -> [u8; HEADER] {
        match self.pages {
            Some(pages) => header(ADD_F, page_flags::PRESENT, Some(pages), self.pid.into()),
            None => header(ADD, 0, None, 0),
        }
    }

    /// What a header says that answers a request for `asked` of the process `pid`.
    ///
    /// # Errors
    /// [`ProtocolError`], if it answers something else.
    pub fn decode(bytes: &[u8; HEADER], pid: u32, asked: Pages) -> Result<Self, ProtocolError> {
        let Fields { command, start, count, object, .. } = Fields::of(bytes);
        if command != ADD && command != ADD_F {
            return Err(ProtocolError::Command { command });
        }
        if count == 0 {
            return Ok(Self { pid, pages: None });
        }
        if object != u64::from(pid) || start != asked.start || count > asked.count {
            return Err(ProtocolError::Answer { pid: object, start, count });
        }
        Ok(Self { pid, pages: Some(Pages { start, count }) })
    }
}

/// Reads the next header; `None` if the peer ended the connection before it.
///
/// # Errors
/// Those of reading; `UnexpectedEof` if the connection ends within the header.
pub fn read_header(reader: &mut impl Read) -> io::Result<Option<[u8; HEADER]>> {
    let mut bytes = [0; HEADER];
    let mut done = 0;
    while done < HEADER {
        match reader.read(&mut bytes[done..]) {
            Ok(0) if done == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(bytes))
}

/// Why what a peer says is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum ProtocolError {
    /// Not a command.
    #[error("it sends command {command:#x}, which there is not: it speaks another protocol")]
    Command { command: u32 },
    /// Neither a process nor a shared object.
    #[error("it sends pages of something of kind {kind}, which CRIU 3.3 and newer do not")]
    Object { kind: u64 },
    /// No process has this pid.
    #[error("it names a process {pid}, which there cannot be")]
    Pid { pid: u64 },
    /// Outside of memory, or not whole pages.
    #[error("it names {count} pages at {start:x}, which there cannot be")]
    Pages { start: u64, count: u64 },
    /// Bits without a meaning.
    #[error("it sends pages with flags {flags:#x}, of which some are unknown")]
    Flags { flags: u32 },
    /// An answer to another question.
    #[error("it answers with {count} pages at {start:x} of process {pid}, which it was not asked for")]
    Answer { pid: u64, start: u64, count: u64 },
}

fn known(flags: u32) -> Result<u32, ProtocolError> {
    if flags & !(page_flags::PARENT | page_flags::LAZY | page_flags::PRESENT) == 0 {
        Ok(flags)
    } else {
        Err(ProtocolError::Flags { flags })
    }
}

/// The numbers of a header.
struct Fields {
    command: u32,
    flags: u32,
    start: u64,
    count: u64,
    object: u64,
}

impl Fields {
    fn of(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        // The padding after it goes with the upper half.
        let command = word(0) as u32;
        Self {
            command: command & ((1 << COMMAND_BITS) - 1),
            flags: command >> COMMAND_BITS,
            count: word(8),
            start: word(16),
            object: word(24),
        }
    }
}

fn header(command: u32, flags: u32, pages: Option<Pages>, object: u64) -> [u8; HEADER] {
    let (start, count) = pages.map_or((0, 0), |pages| (pages.start, pages.count));
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&(flags << COMMAND_BITS | command).to_le_bytes());
    bytes[8..16].copy_from_slice(&count.to_le_bytes());
    bytes[16..24].copy_from_slice(&start.to_le_bytes());
    bytes[24..].copy_from_slice(&object.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(command: u32, count: u64, start: u64, object: u64) -> [u8; HEADER] {
        let mut bytes = [0xee; HEADER];
        bytes[..4].copy_from_slice(&command.to_le_bytes());
        bytes[8..16].copy_from_slice(&count.to_le_bytes());
        bytes[16..24].copy_from_slice(&start.to_le_bytes());
        bytes[24..].copy_from_slice(&object.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_lies_as_the_c_structure_does() {
        let pages = Pages::new(0x7f01_2345_6000, 3).unwrap();
        let add =
            Command::Add { object: Object::Process(0x1234), pages, flags: page_flags::PRESENT | page_flags::LAZY };
        assert_eq!(
            add.encode(),
            [
                6, 0, 6, 0, 0, 0, 0, 0, // command, flags, padding
                3, 0, 0, 0, 0, 0, 0, 0, // pages
                0, 0x60, 0x45, 0x23, 1, 0x7f, 0, 0, // address
                1, 0x34, 0x12, 0, 0, 0, 0, 0, // kind, pid
            ]
        );
        let get = Command::Get { pid: 0x1234, pages };
        assert_eq!(get.encode()[..4], [7, 0, 0, 0]);
        assert_eq!(get.encode()[24..], [0x34, 0x12, 0, 0, 0, 0, 0, 0], "the bare pid");
        assert_eq!(Command::Close.encode()[..4], [0x23, 0x10, 0, 0]);
        assert_eq!(Command::ForceClose.encode()[..4], [0x24, 0x10, 0, 0]);
    }

    #[test]
    fn every_command_reads_back() {
        let (process, shared) = (Object::Process(7), Object::Shared((1 << 56) - 1));
        let pages = Pages::new(0, ADDRESS_END / PAGE_SIZE).unwrap();
        for command in [
            Command::Open { object: process, answered: true },
            Command::Open { object: shared, answered: false },
            Command::HasParent { object: shared },
            Command::Add { object: shared, pages, flags: page_flags::PARENT },
            Command::Add { object: process, pages, flags: page_flags::PRESENT },
            Command::Get { pid: 1, pages },
            Command::Close,
            Command::ForceClose,
        ] {
            assert_eq!(Command::decode(&command.encode()), Ok(command));
        }
    }

    #[test]
    fn old_commands_and_any_padding_are_understood() {
        let pages = Pages::new(0x5000, 2).unwrap();
        let add = |flags| Ok(Command::Add { object: Object::Shared(9), pages, flags });
        assert_eq!(Command::decode(&bytes(ADD, 2, 0x5000, 9 << 8 | 2)), add(page_flags::PRESENT));
        assert_eq!(Command::decode(&bytes(HOLE, 2, 0x5000, 9 << 8 | 2)), add(page_flags::PARENT));
        assert_eq!(Command::decode(&bytes(ADD_F | 6 << 16, 2, 0x5000, 9 << 8 | 2)), add(6));
        assert_eq!(Command::decode(&bytes(CLOSE, 0, 0, 0)), Ok(Command::Close));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let process = 7 << 8 | 1;
        for (header, problem) in [
            (bytes(0, 1, 0, process), "command 0x0"),
            (bytes(8, 1, 0, process), "command 0x8"),
            (bytes(0xffff_ffff, 1, 0, process), "command 0xffff"),
            (bytes(ADD_F | 8 << 16, 1, 0, process), "flags 0x8"),
            (bytes(ADD_F | 4 << 16, 0, 0, process), "0 pages"),
            (bytes(ADD_F | 4 << 16, 1, 1, process), "at 1,"),
            (bytes(ADD_F | 4 << 16, 1, ADDRESS_END, process), "1 pages"),
            (bytes(ADD_F | 4 << 16, u64::MAX, 0x1000, process), "pages at 1000"),
            (bytes(ADD_F | 4 << 16, 1 << 52, 0x1000, process), "pages at 1000"),
            (bytes(ADD_F | 4 << 16, 1, u64::MAX - 0xfff, process), "1 pages"),
            (bytes(ADD_F | 4 << 16, 1, 0, 7 << 8), "kind 0"),
            (bytes(OPEN2, 0, 0, 7 << 8 | 11), "kind 11"),
            (bytes(OPEN2, 0, 0, 1), "process 0"),
            (bytes(OPEN2, 0, 0, u64::MAX << 8 | 1), "process 72057594037927935"),
            (bytes(GET, 1, 0, 1 << 31), "process 2147483648"),
        ] {
            let sentence = Command::decode(&header).unwrap_err().to_string();
            assert!(sentence.contains(problem), "{problem}: {sentence}");
        }
    }

    #[test]
    fn an_answer_must_be_to_what_was_asked() {
        let asked = Pages::new(0x8000, 4).unwrap();
        let answer = |count, start, pid| GotPages::decode(&bytes(ADD_F | 4 << 16, count, start, pid), 7, asked);
        for count in 1..=4 {
            let got = GotPages { pid: 7, pages: Some(Pages { start: 0x8000, count }) };
            assert_eq!(answer(count, 0x8000, 7), Ok(got));
            assert_eq!(GotPages::decode(&got.encode(), 7, asked), Ok(got));
        }
        let none = GotPages { pid: 7, pages: None };
        assert_eq!(GotPages::decode(&none.encode(), 7, asked), Ok(none));
        for (count, start, pid) in [(5, 0x8000, 7), (1, 0x9000, 7), (1, 0x8000, 8), (u64::MAX, 0x8000, 7)] {
            assert!(matches!(answer(count, start, pid), Err(ProtocolError::Answer { .. })));
        }
        assert!(GotPages::decode(&Command::Close.encode(), 7, asked).is_err());
    }

    #[test]
    fn the_end_is_told_from_a_torn_header() {
        let header = Command::Close.encode();
        assert_eq!(read_header(&mut &header[..]).unwrap(), Some(header));
        assert_eq!(read_header(&mut &[][..]).unwrap(), None);
        assert_eq!(read_header(&mut &header[..31]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn objects_are_named_as_their_images_are() {
        assert_eq!(Object::Process(7).image(), (Kind::Pagemap, 7));
        for object in [Object::Process(7), Object::Shared(1 << 40)] {
            let (kind, number) = object.image();
            assert_eq!(Object::of_image(kind, number), Some(object));
        }
        assert_eq!(Object::of_image(Kind::ShmemPagemap, u64::MAX), None);
        assert_eq!(Object::of_image(Kind::Core, 7), None);
    }
}
