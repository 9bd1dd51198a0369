//! What has to change in an address space that fork(2) gave to a task, until it is the one in its image.
//!
//! A child starts with its parent's finished memory. Where both have the same mapping it stays, and with it every page
//! that is equal: those are shared copy-on-write again, as they were. Pages that differ are written, pages that only the
//! parent has are dropped, and all else is unmapped and mapped anew. The first task inherits nothing.
//!
//! All of this is computed from images, before the task exists.

use std::ops::Range;

use crate::sys::PAGE_SIZE;

use super::layout::{Backing, Layout, Mapping, subtract};
use super::pageset::PageSet;

const WRITE: u32 = libc::PROT_WRITE as u32;
const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

/// The memory of one image set entry: mappings, pages, and the bytes that the pages' offsets refer to.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    /// The mappings.
    pub layout: &'a Layout,
    /// Which pages there are.
    pub pages: &'a PageSet,
    /// The pages image.
    pub bytes: &'a [u8],
}

/// A range to be mapped anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// Addresses; within one mapping, or over several neighbours of private anonymous memory.
    pub range: Range<u64>,
    /// Which mapping of the layout it is of (the first, if several).
    pub mapping: usize,
    /// `PROT_*` until the pages are written.
    pub protection: u32,
}

/// Bytes of the pages image to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// Address in the task.
    pub address: u64,
    /// Where in the pages image.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

/// The changes, in the order in which they are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What stays mapped, ascending.
    pub keep: Vec<Range<u64>>,
    /// What is mapped.
    pub fresh: Vec<Fresh>,
    /// What is kept but must be writable while pages are written.
    pub unprotect: Vec<Range<u64>>,
    /// Pages that are dropped.
    pub drop: Vec<Range<u64>>,
    /// Pages that are written, ascending.
    pub writes: Vec<PageWrite>,
    /// Protections that are put right afterwards.
    pub protect: Vec<(Range<u64>, u32)>,
    /// Pages that the parent has too.
    pub compared: u64,
    /// Those of them that are written nevertheless, because they differ.
    pub different: u64,
}

/// A part of a mapping, and how it is mapped when its pages have been written.
struct Piece {
    range: Range<u64>,
    mapping: usize,
    /// Protection that it has from the parent; none for a fresh one.
    inherited: Option<u32>,
    written: bool,
}

impl Changes {
    /// Computes how a task becomes `target` when it starts as a copy of `parent`.
    pub fn between(parent: Option<Memory<'_>>, target: Memory<'_>) -> Self {
        let mut pieces = Vec::new();
        for (index, mapping) in target.layout.mappings.iter().enumerate() {
            cut(parent.map(|parent| parent.layout), index, mapping, &mut pieces);
        }
        let mut changes = Self::default();
        for piece in &mut pieces {
            let before = changes.written();
            let mapping = &target.layout.mappings[piece.mapping];
            if mapping.is_private() {
                changes.pages(parent, target, piece);
            }
            piece.written = changes.written() > before;
        }
        changes.place(target.layout, &pieces);
        changes
    }

    /// Bytes to be written so far. Not the number of writes: neighbours are one.
    fn written(&self) -> (usize, u64) {
        (self.writes.len(), self.writes.last().map_or(0, |write| write.length))
    }

    /// Finds the pages of one piece that are written or dropped.
    fn pages(&mut self, parent: Option<Memory<'_>>, target: Memory<'_>, piece: &Piece) {
        let inherited = parent.filter(|_| piece.inherited.is_some());
        let mut present = Vec::new();
        for run in target.pages.within(piece.range.clone()) {
            present.push(run.range.clone());
            let Some(parent) = inherited else {
                self.write(run.range.start, run.offset, run.range.end - run.range.start);
                continue;
            };
            let mut at = run.range.start;
            for theirs in parent.pages.within(run.range.clone()) {
                let offset = run.offset + (at - run.range.start);
                self.write(at, offset, theirs.range.start - at);
                at = theirs.range.end;
                let ours = run.offset + (theirs.range.start - run.range.start);
                self.differing(theirs.range, (target.bytes, ours), (parent.bytes, theirs.offset));
            }
            self.write(at, run.offset + (at - run.range.start), run.range.end - at);
        }
        for theirs in inherited.into_iter().flat_map(|parent| parent.pages.within(piece.range.clone())) {
            self.drop.extend(subtract(theirs.range, &present));
        }
    }

    /// Writes those pages of `range` that are not the same in both images.
    fn differing(&mut self, range: Range<u64>, ours: (&[u8], u64), theirs: (&[u8], u64)) {
        let length = (range.end - range.start) as usize;
        let our_bytes = &ours.0[ours.1 as usize..ours.1 as usize + length];
        let their_bytes = &theirs.0[theirs.1 as usize..theirs.1 as usize + length];
        self.compared += length as u64 / PAGE_SIZE;
        if our_bytes == their_bytes {
            return;
        }
        let page = PAGE_SIZE as usize;
        for (index, (our, their)) in our_bytes.chunks(page).zip(their_bytes.chunks(page)).enumerate() {
            if our != their {
                let skip = index as u64 * PAGE_SIZE;
                self.different += 1;
                self.write(range.start + skip, ours.1 + skip, PAGE_SIZE);
            }
        }
    }

    fn write(&mut self, address: u64, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        match self.writes.last_mut() {
            Some(last) if last.address + last.length == address && last.offset + last.length == offset => {
                last.length += length;
            }
            _ => self.writes.push(PageWrite { address, offset, length }),
        }
    }

    /// Decides how each piece is mapped before and after its pages are written.
    fn place(&mut self, layout: &Layout, pieces: &[Piece]) {
        let mut open: Option<Fresh> = None;
        let mut members: Vec<&Piece> = Vec::new();
        for piece in pieces {
            let mapping = &layout.mappings[piece.mapping];
            if let Some(protection) = piece.inherited {
                self.keep_piece(piece, protection, mapping.protection);
                continue;
            }
            // Neighbours are mapped in one call and then cut apart by their protections, which is cheaper and lets the
            // kernel join them again later. Memory that nobody has written stays out: it may be reserved on a scale that
            // the kernel grants only while it cannot be written.
            let joins = mapping.backing == Backing::Anonymous && (piece.written || mapping.protection & WRITE != 0);
            if let Some(group) = open.as_mut().filter(|group| joins && group.range.end == piece.range.start) {
                let first = &layout.mappings[group.mapping];
                if first.flags == mapping.flags && first.advice == mapping.advice {
                    group.range.end = piece.range.end;
                    group.protection = READ_WRITE;
                    members.push(piece);
                    continue;
                }
            }
            self.close_group(layout, open.take(), &members);
            members = vec![piece];
            let protection = mapping.protection | if piece.written { READ_WRITE } else { 0 };
            let fresh = Fresh { range: piece.range.clone(), mapping: piece.mapping, protection };
            if joins {
                open = Some(fresh);
            } else {
                self.close_group(layout, Some(fresh), &members);
            }
        }
        self.close_group(layout, open, &members);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in self.keep.drain(..) {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        self.keep = joined;
    }

    fn keep_piece(&mut self, piece: &Piece, current: u32, wanted: u32) {
        self.keep.push(piece.range.clone());
        let opened = piece.written && current & WRITE == 0;
        if opened {
            self.unprotect.push(piece.range.clone());
        }
        if opened || current != wanted {
            self.protect.push((piece.range.clone(), wanted));
        }
    }

    fn close_group(&mut self, layout: &Layout, group: Option<Fresh>, members: &[&Piece]) {
        let Some(group) = group else { return };
        for member in members {
            let wanted = layout.mappings[member.mapping].protection;
            if wanted == group.protection {
                continue;
            }
            match self.protect.last_mut() {
                Some((last, protection)) if last.end == member.range.start && *protection == wanted => {
                    last.end = member.range.end;
                }
                _ => self.protect.push((member.range.clone(), wanted)),
            }
        }
        self.fresh.push(group);
    }
}

/// Cuts a mapping into what the parent has already and what it has not.
fn cut(parent: Option<&Layout>, index: usize, mapping: &Mapping, pieces: &mut Vec<Piece>) {
    let mut kept = Vec::new();
    if let Some(parent) = parent {
        let first = parent.mappings.partition_point(|other| other.range.end <= mapping.range.start);
        for other in parent.mappings[first..].iter().take_while(|other| other.range.start < mapping.range.end) {
            if mapping.inherits(other) {
                let range = mapping.range.start.max(other.range.start)..mapping.range.end.min(other.range.end);
                kept.push((range, other.protection));
            }
        }
    }
    let holes: Vec<_> = kept.iter().map(|(range, _)| range.clone()).collect();
    let fresh = subtract(mapping.range.clone(), &holes);
    let fresh = fresh.into_iter().map(|range| Piece { range, mapping: index, inherited: None, written: false });
    let kept = kept.into_iter().map(|(range, protection)| Piece {
        range,
        mapping: index,
        inherited: Some(protection),
        written: false,
    });
    let start = pieces.len();
    pieces.extend(fresh.chain(kept));
    pieces[start..].sort_by_key(|piece| piece.range.start);
}

#[cfg(test)]
mod tests {
    use super::super::pageset::PageRun;
    use super::*;

    const PAGE: u64 = PAGE_SIZE;
    const READ: u32 = libc::PROT_READ as u32;

    fn anonymous(range: Range<u64>, protection: u32) -> Mapping {
        Mapping {
            range: range.start * PAGE..range.end * PAGE,
            backing: Backing::Anonymous,
            offset: 0,
            protection,
            flags: 0,
            locked: false,
            advice: 0,
        }
    }

    struct Image {
        layout: Layout,
        pages: PageSet,
        bytes: Vec<u8>,
    }

    impl Image {
        /// `pages`: page number and the byte that fills the page.
        fn new(mappings: Vec<Mapping>, pages: &[(u64, u8)]) -> Self {
            let mut runs: Vec<PageRun> = Vec::new();
            let mut bytes = Vec::new();
            for (page, byte) in pages {
                let offset = bytes.len() as u64;
                match runs.last_mut() {
                    Some(last) if last.range.end == page * PAGE => last.range.end += PAGE,
                    _ => runs.push(PageRun { range: page * PAGE..(page + 1) * PAGE, offset }),
                }
                bytes.extend_from_slice(&[*byte; PAGE as usize]);
            }
            Self {
                layout: Layout { mappings, ..Layout::default() },
                pages: PageSet { runs, elsewhere: Vec::new() },
                bytes,
            }
        }

        fn memory(&self) -> Memory<'_> {
            Memory { layout: &self.layout, pages: &self.pages, bytes: &self.bytes }
        }
    }

    fn pages_of(writes: &[PageWrite]) -> Vec<u64> {
        writes.iter().flat_map(|write| (0..write.length / PAGE).map(|page| write.address / PAGE + page)).collect()
    }

    #[test]
    fn the_first_task_maps_and_writes_everything() {
        let image = Image::new(vec![anonymous(4..8, READ_WRITE), anonymous(10..12, READ)], &[(5, 1), (6, 2), (11, 3)]);
        let changes = Changes::between(None, image.memory());
        assert_eq!(pages_of(&changes.writes), [5, 6, 11]);
        assert_eq!(changes.writes.len(), 2);
        assert_eq!((changes.keep.len(), changes.drop.len(), changes.unprotect.len()), (0, 0, 0));
        let fresh: Vec<_> = changes.fresh.iter().map(|fresh| (fresh.range.start / PAGE, fresh.protection)).collect();
        assert_eq!(fresh, [(4, READ_WRITE), (10, READ_WRITE)]);
        assert_eq!(changes.protect, [(10 * PAGE..12 * PAGE, READ)]);
    }

    #[test]
    fn neighbours_are_mapped_at_once_but_reservations_are_not_made_writable() {
        let image = Image::new(
            vec![anonymous(1..2, READ_WRITE), anonymous(2..3, READ), anonymous(3..4, READ_WRITE), anonymous(4..9, 0)],
            &[(1, 1), (2, 2)],
        );
        let changes = Changes::between(None, image.memory());
        let fresh: Vec<_> = changes
            .fresh
            .iter()
            .map(|fresh| (fresh.range.start / PAGE..fresh.range.end / PAGE, fresh.protection))
            .collect();
        assert_eq!(fresh, [(1..4, READ_WRITE), (4..9, 0)]);
        assert_eq!(changes.protect, [(2 * PAGE..3 * PAGE, READ)]);
    }

    #[test]
    fn a_child_keeps_equal_pages_and_nothing_more() {
        let parent = Image::new(vec![anonymous(1..8, READ)], &[(1, 1), (2, 2), (3, 3), (6, 6)]);
        let child = Image::new(vec![anonymous(1..6, READ)], &[(2, 2), (3, 9), (4, 4)]);
        let changes = Changes::between(Some(parent.memory()), child.memory());
        assert_eq!(changes.keep, [PAGE..6 * PAGE]);
        assert_eq!(changes.fresh, []);
        assert_eq!(pages_of(&changes.writes), [3, 4]);
        assert_eq!((changes.compared, changes.different), (2, 1));
        assert_eq!(changes.drop, [PAGE..2 * PAGE], "page 6 goes with its mapping");
        assert_eq!(changes.unprotect, [PAGE..6 * PAGE]);
        assert_eq!(changes.protect, [(PAGE..6 * PAGE, READ)]);
    }

    #[test]
    fn a_heap_that_grew_keeps_its_old_part() {
        let parent = Image::new(vec![anonymous(1..4, READ_WRITE)], &[(1, 1)]);
        let child = Image::new(vec![anonymous(1..6, READ_WRITE)], &[(1, 1), (5, 5)]);
        let changes = Changes::between(Some(parent.memory()), child.memory());
        assert_eq!(changes.keep, [PAGE..4 * PAGE]);
        assert_eq!(changes.fresh.iter().map(|fresh| fresh.range.clone()).collect::<Vec<_>>(), [4 * PAGE..6 * PAGE]);
        assert_eq!(pages_of(&changes.writes), [5]);
        assert_eq!(changes.protect, []);
    }

    #[test]
    fn another_file_or_advice_is_not_inherited() {
        let mut file = anonymous(1..4, READ);
        file.backing = Backing::File { id: 1, shared: false, access: 0 };
        let mut other = file.clone();
        other.backing = Backing::File { id: 2, shared: false, access: 0 };
        let mut moved = file.clone();
        moved.offset = PAGE;
        let mut unforked = file.clone();
        unforked.advice = super::super::layout::advice::DONTFORK;
        for (ours, theirs) in [(&file, &other), (&file, &moved), (&unforked, &unforked)] {
            let parent = Image::new(vec![theirs.clone()], &[(1, 1)]);
            let child = Image::new(vec![ours.clone()], &[(1, 1)]);
            let changes = Changes::between(Some(parent.memory()), child.memory());
            assert_eq!((changes.keep.len(), changes.fresh.len(), changes.writes.len()), (0, 1, 1), "{ours:?}");
        }
    }
}
