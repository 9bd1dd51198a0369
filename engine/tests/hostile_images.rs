//! Images made of arbitrary bytes: whatever they are, reading them is an error or a message, never a crash, and what is read
//! is written back the same.
//!
//! The bytes come from a generator with a fixed seed, so that a failure can be repeated. Half of the images are sound ones of
//! the format with some bytes changed, which get further than noise does.

use std::fmt::Debug;

use ferry_engine::images::{
    ArchiveSink, ArchiveSource, ImageSet, Kind, Manifest, Sink, Source, Spool, core, decode_all, encode, files, layout,
    mm, pstree,
};

/// Xorshift; its period is long enough and it needs no crate.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// A protobuf message that is well-formed but means nothing: small field numbers, every wire type, messages in messages.
    fn message(&mut self, depth: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..self.below(8) {
            let field = self.below(22) as u64 + 1;
            let wire = [0, 0, 0, 2, 2, 1, 5][self.below(7)];
            varint(&mut bytes, field << 3 | wire);
            match wire {
                0 => {
                    let shift = self.below(64);
                    varint(&mut bytes, self.next() >> shift);
                }
                1 => bytes.extend(self.next().to_le_bytes()),
                5 => bytes.extend((self.next() as u32).to_le_bytes()),
                _ => {
                    let inner = if depth == 0 { vec![b'x'; self.below(5)] } else { self.message(depth - 1) };
                    varint(&mut bytes, inner.len() as u64);
                    bytes.extend(inner);
                }
            }
        }
        bytes
    }

    fn image(&mut self, kind: Kind) -> Vec<u8> {
        let mut image = kind.magic();
        for _ in 0..self.below(4) {
            let message = self.message(3);
            image.extend((message.len() as u32).to_le_bytes());
            image.extend(message);
            image.extend(vec![0; self.below(20)]);
        }
        image
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.next() as u8),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = self.next() as u8;
                    }
                }
            }
        }
    }
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[test]
fn no_image_crashes_the_reader() {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let (mut understood, mut partly, mut refused) = (0, 0, 0);
    for round in 0..300 {
        for &kind in Kind::ALL {
            let mut image = noise.image(kind);
            if round % 2 == 0 {
                noise.damage(&mut image);
            }
            match layout::first_unknown(kind, "noise.img", &image) {
                Ok(None) => understood += 1,
                Ok(Some(offset)) => {
                    assert!(offset < image.len());
                    partly += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains("noise.img"), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(
        understood > 100 && partly > 100 && refused > 100,
        "{understood} {partly} {refused}: the noise is one-sided"
    );
}

#[test]
fn what_is_read_is_written_back_the_same() {
    fn check<M: prost::Message + Default + PartialEq + Debug>(kind: Kind, noise: &mut Noise) -> usize {
        let read = (0..2000).filter_map(|_| decode_all::<M>("noise.img", kind, &noise.image(kind)).ok());
        read.map(|messages| {
            let again = encode(kind, &messages);
            assert_eq!(decode_all::<M>("noise.img", kind, &again).unwrap(), messages);
            messages.len()
        })
        .sum()
    }
    let mut noise = Noise(7);
    let counts = [
        check::<core::CoreEntry>(Kind::Core, &mut noise),
        check::<mm::MmEntry>(Kind::Mm, &mut noise),
        check::<files::FileEntry>(Kind::Files, &mut noise),
        check::<pstree::PstreeEntry>(Kind::Pstree, &mut noise),
    ];
    assert!(counts.iter().all(|&count| count > 20), "{counts:?}: too few messages were read");
}

#[test]
fn no_archive_crashes_the_reader_or_gives_other_content() {
    let mut sink = ArchiveSink::new(Vec::new()).unwrap();
    let tree = encode(Kind::Pstree, &[pstree::PstreeEntry { pid: 1, threads: vec![1], ..Default::default() }]);
    let pages = vec![5; 3 * 4096];
    sink.put_member("config.dump", b"{}").unwrap();
    sink.put("pstree.img", &tree).unwrap();
    sink.put_raw("pages-1.img", &pages).unwrap();
    sink.finish(Manifest::new("6.18", 4096)).unwrap();
    let whole = sink.close().unwrap();

    let mut noise = Noise(99);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..2000 {
        let mut bytes = whole.clone();
        noise.damage(&mut bytes);
        let Ok(source) = ArchiveSource::spool(bytes.as_slice(), &Spool::Memory, 1 << 20) else {
            refused += 1;
            continue;
        };
        // Without its manifest nothing of a set can be verified; with it, everything is.
        if source.find("ferry.json").unwrap().is_none() {
            continue;
        }
        let Ok(set) = ImageSet::open(Box::new(source)) else {
            refused += 1;
            continue;
        };
        for (name, content) in [("pstree.img", &tree), ("pages-1.img", &pages)] {
            match set.bytes(name) {
                Ok(found) => assert_eq!(found.as_ref(), Some(content), "{name}"),
                Err(_) => refused += 1,
            }
        }
        accepted += 1;
    }
    assert!(accepted > 100 && refused > 100, "{accepted} {refused}: the damage is one-sided");
}
