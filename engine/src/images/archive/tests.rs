//! Archives against truncation, damage and hostile members.

use std::fs::File;
use std::io::{Cursor, Read, Seek, Write};

use tar::{Builder, EntryType, Header};

use super::*;
use crate::images::manifest::Manifest;
use crate::images::{ImageSet, Sink, Source, SourceError};

const MANY: u64 = 1 << 30;

/// Both ways to read the same bytes.
fn read(bytes: &[u8]) -> [Result<ArchiveSource, SourceError>; 2] {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    [ArchiveSource::open(file), ArchiveSource::spool(bytes, &Spool::Memory, MANY)]
}

fn pages() -> Vec<u8> {
    (0..5 * 1024 * 1024 + 700u32).map(|at| (at ^ (at >> 9)) as u8).collect()
}

/// An archive as a dump writes it.
fn archive() -> Vec<u8> {
    archive_of(pages())
}

fn archive_of(pages: Vec<u8>) -> Vec<u8> {
    let mut sink = ArchiveSink::new(Vec::new()).unwrap();
    sink.put_member("config.dump", b"{}").unwrap();
    sink.put("core-1.img", b"record").unwrap();
    sink.put_raw("pages-1.img", &pages).unwrap();
    sink.put_raw("pages-2.img", &Vec::new()).unwrap();
    sink.finish(Manifest::new("6.18", 4096)).unwrap();
    sink.put_member_raw("rootfs-diff.tar", &b"diff".to_vec()).unwrap();
    sink.close().unwrap()
}

/// An archive of one odd member.
fn odd(kind: EntryType, path: &str, change: impl Fn(&mut Header)) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o600);
    change(&mut header);
    header.set_cksum();
    [header.as_bytes().as_slice(), &[0; 1024]].concat()
}

fn refusal(bytes: &[u8]) -> String {
    let [in_place, streamed] = read(bytes).map(|result| result.err().expect("refused").to_string());
    assert_eq!(in_place, streamed);
    in_place
}

#[test]
fn what_is_written_is_read_and_verified_both_ways() {
    for source in read(&archive()) {
        let source = source.unwrap();
        assert_eq!(source.names().unwrap(), ["core-1.img", "ferry.json", "pages-1.img", "pages-2.img"]);
        assert_eq!(source.members().collect::<Vec<_>>(), ["config.dump", "rootfs-diff.tar"]);
        assert_eq!(source.member("rootfs-diff.tar").unwrap().to_vec("").unwrap(), b"diff");
        let set = ImageSet::open(Box::new(source)).unwrap();
        assert_eq!(set.manifest().unwrap().members.keys().collect::<Vec<_>>(), ["config.dump"]);
        assert_eq!(set.bytes("core-1.img").unwrap().unwrap(), b"record");
        let raw = set.raw("pages-1.img").unwrap().unwrap();
        let mut buffer = Vec::new();
        let whole: Vec<u8> =
            (0..raw.chunk_count()).flat_map(|index| raw.read_chunk(index, &mut buffer).unwrap().to_vec()).collect();
        assert!(whole == pages());
        assert_eq!(set.raw("pages-2.img").unwrap().unwrap().chunk_count(), 0);
        assert!(set.bytes("core-2.img").unwrap().is_none());
    }
}

#[test]
fn other_programs_read_it() {
    let mut names = Vec::new();
    for entry in tar::Archive::new(Cursor::new(archive())).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        names.push((entry.path().unwrap().display().to_string(), content.len()));
    }
    assert_eq!(names[0].0, "checkpoint/");
    assert_eq!(names[1], ("config.dump".into(), 2));
    assert_eq!(names[3], ("checkpoint/pages-1.img".into(), pages().len()));
}

#[test]
fn a_file_is_written_with_several_threads_to_the_same_content() {
    let folder = tempfile::tempdir().unwrap();
    let pages = [pages(), pages()].concat();
    for append in [false, true] {
        let path = folder.path().join(if append { "appended" } else { "written" });
        let mut file = File::options().create(true).append(append).write(true).open(&path).unwrap();
        file.write_all(b"before").unwrap();
        let mut sink = ArchiveSink::in_file(file).unwrap();
        sink.put("core-1.img", b"record").unwrap();
        sink.put_raw("pages-1.img", &pages).unwrap();
        sink.finish(Manifest::new("6.18", 4096)).unwrap();
        sink.close().unwrap();
        let mut file = File::open(&path).unwrap();
        file.seek(std::io::SeekFrom::Start(6)).unwrap();
        let source = ArchiveSource::spool(file, &Spool::Memory, MANY).unwrap();
        let set = ImageSet::open(Box::new(source)).unwrap();
        assert!(set.bytes("pages-1.img").unwrap().unwrap() == pages);
        assert_eq!(set.bytes("core-1.img").unwrap().unwrap(), b"record");
    }
}

#[test]
fn a_packed_image_folder_of_another_program_is_read() {
    let mut builder = Builder::new(Vec::new());
    let long = "x".repeat(150);
    builder.append_pax_extensions([("size", b"3".as_slice()), ("SCHILY.xattr.user.a", b"b")]).unwrap();
    for name in ["./inventory.img", long.as_str()] {
        let mut header = Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o600);
        builder.append_data(&mut header, name, b"abc".as_slice()).unwrap();
    }
    for source in read(&builder.into_inner().unwrap()) {
        let source = source.unwrap();
        assert_eq!(source.names().unwrap(), ["inventory.img", &long]);
        assert_eq!(source.get("inventory.img").unwrap().unwrap(), b"abc");
        assert!(ImageSet::open(Box::new(source)).unwrap().manifest().is_none());
    }
}

#[test]
fn truncation_anywhere_is_noticed() {
    let whole = archive_of(vec![1; 5000]);
    for cut in (0..whole.len()).step_by(64).chain(whole.len() - 1025..whole.len()) {
        let sentence = refusal(&whole[..cut]);
        assert!(sentence.contains("truncated"), "cut at {cut}: {sentence}");
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed_or_harmless() {
    let whole = archive_of(vec![1; 5000]);
    // The header of the first image; its name, type and size matter, all of it is under its checksum.
    let start = 512 + 1024;
    for bit in 0..512 * 8 {
        let mut flipped = whole.clone();
        flipped[start + bit / 8] ^= 1 << (bit % 8);
        let Ok(source) = ArchiveSource::spool(flipped.as_slice(), &Spool::Memory, MANY) else { continue };
        let set = ImageSet::open(Box::new(source)).unwrap();
        assert_eq!(set.bytes("core-1.img").unwrap().unwrap(), b"record", "bit {bit}");
    }
}

#[test]
fn a_flipped_bit_of_content_is_noticed_when_it_is_used() {
    let mut file = tempfile::tempfile().unwrap();
    let mut bytes = archive();
    let at = bytes.windows(6).position(|window| window == b"record").unwrap();
    bytes[at + 5] ^= 0x10;
    bytes[3 << 20] ^= 0x10;
    file.write_all(&bytes).unwrap();
    let set = ImageSet::open(Box::new(ArchiveSource::open(file).unwrap())).unwrap();
    assert!(set.bytes("core-1.img").unwrap_err().to_string().contains("core-1.img is damaged"));
    let raw = set.raw("pages-1.img").unwrap().unwrap();
    let mut buffer = Vec::new();
    let bad: Vec<u64> = (0..raw.chunk_count()).filter(|&index| raw.read_chunk(index, &mut buffer).is_err()).collect();
    assert_eq!(bad, [2]);
    let sentence = set.bytes("pages-1.img").unwrap_err().to_string();
    assert!(sentence.contains("from offset 2097152 on"), "{sentence}");
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    let paths = [
        "../core-1.img",
        "/etc/passwd",
        "checkpoint/../x",
        "checkpoint//x",
        "checkpoint/./x",
        "a/b/c",
        "..",
        "checkpoint/a/b",
    ];
    for path in paths {
        let sentence = refusal(&odd(EntryType::Regular, path, |_| {}));
        assert!(sentence.contains(path), "{sentence}");
    }
    let sentence = refusal(&odd(EntryType::Directory, "checkpoint/sub/", |_| {}));
    assert!(sentence.contains("flat"), "{sentence}");
    assert!(refusal(&odd(EntryType::Regular, "x", |header| header.as_old_mut().name[..2].fill(0xff))).contains("name"));
}

#[test]
fn anything_but_regular_files_is_refused() {
    let link = |header: &mut Header| header.set_link_name("/etc/shadow").unwrap();
    for kind in [EntryType::Symlink, EntryType::Link] {
        assert!(refusal(&odd(kind, "checkpoint/core-1.img", link)).contains("is a link"));
    }
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo, EntryType::GNUSparse, EntryType::new(b'?')] {
        assert!(refusal(&odd(kind, "checkpoint/core-1.img", |_| {})).contains("not a regular file"));
    }
}

#[test]
fn duplicates_are_refused() {
    let one = odd(EntryType::Regular, "checkpoint/core-1.img", |_| {});
    assert!(refusal(&[&one[..512], &one].concat()).contains("twice"));
}

#[test]
fn false_sizes_are_refused() {
    for size in [1u64, 1025, 1 << 40, u64::MAX] {
        let bytes = odd(EntryType::Regular, "checkpoint/pages-1.img", |header| header.set_size(size));
        for result in read(&bytes) {
            let sentence = result.err().expect("refused").to_string();
            assert!(sentence.contains("truncated") || sentence.contains("too large"), "{size}: {sentence}");
        }
    }
    // Extended headers are read into memory, so that their size is bounded.
    for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::XGlobalHeader] {
        let bytes = odd(kind, "x", |header| header.set_size(2 << 20));
        assert!(refusal(&bytes).contains("damaged"), "{kind:?}");
    }
}

#[test]
fn what_is_no_archive_is_called_so() {
    for bytes in [vec![b'x'; 4096], b"PK\x03\x04".repeat(512)] {
        assert!(refusal(&bytes).contains("no tar archive"));
    }
    assert!(refusal(b"").contains("truncated"));
    assert!(refusal(b"{}").contains("truncated"));
}

#[test]
fn a_stream_is_bounded() {
    let whole = archive();
    let error = ArchiveSource::spool(whole.as_slice(), &Spool::Memory, 1 << 20).err().unwrap();
    assert!(error.to_string().contains("more than 1048576 bytes"), "{error}");
    let endless = whole.as_slice().chain(std::io::repeat(0));
    assert!(matches!(ArchiveSource::spool(endless, &Spool::Memory, MANY), Err(SourceError::Trailer)));
}

#[test]
fn a_stream_can_be_kept_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let source = ArchiveSource::spool(archive().as_slice(), &Spool::Folder(folder.path().to_owned()), MANY).unwrap();
    assert_eq!(source.get("core-1.img").unwrap().unwrap(), b"record");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let pages = source.find("pages-1.img").unwrap().unwrap();
    assert_eq!(pages.offset() % 4096, 0);
}

#[test]
fn failures_of_the_writer_and_of_the_content_are_told_apart() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if bytes.len() > 512 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let error = ArchiveSink::new(Full).unwrap().put_raw("pages-1.img", &pages()).unwrap_err().to_string();
    assert!(error.starts_with("cannot write"), "{error}");

    let mut short = tempfile::tempfile().unwrap();
    short.write_all(&pages()).unwrap();
    short.rewind().unwrap();
    let content = crate::images::FileContent::new(&short, 0, pages().len() as u64 + 1);
    let error = ArchiveSink::new(Vec::new()).unwrap().put_raw("pages-1.img", &content).unwrap_err().to_string();
    assert!(
        error.contains("cannot read what is to go into image checkpoint/pages-1.img, at offset 5242880"),
        "{error}"
    );
}

#[test]
fn sizes_beyond_eight_gibibytes_are_written_and_read() {
    // A header only: the content would not fit a test.
    struct Huge;
    impl crate::images::Content for Huge {
        fn len(&self) -> u64 {
            9 << 30
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Other.into())
        }
    }
    let file = tempfile::tempfile().unwrap();
    let mut sink = ArchiveSink::new(file.try_clone().unwrap()).unwrap();
    sink.put_raw("pages-1.img", &Huge).unwrap_err();
    file.set_len((9 << 30) + 2 * 512 + 1024).unwrap();
    let source = ArchiveSource::open(file).unwrap();
    assert_eq!(source.find("pages-1.img").unwrap().unwrap().len(), 9 << 30);
}
