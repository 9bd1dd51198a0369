//! What each kind of image consists of: which messages, in which order, with which tails.
//!
//! The readers of single kinds know theirs. This table knows all, to check a set that somebody else made before anything
//! of it is restored: an entry that does not encode back to its own bytes has a field that this version does not know, or lacks
//! one that must be there, and either would be dropped silently.

use prost::Message;

use super::frame::{DecodeError, Reader};
use super::kind::Kind;
use super::record::*;

/// Decodes a whole image. Returns the offset of the first entry that is not fully understood.
///
/// Raw images have no entries. The bytes that follow a deleted file's entry are not looked at, so that its beginning is enough.
///
/// # Errors
/// [`DecodeError`].
pub fn first_unknown(kind: Kind, image: &str, bytes: &[u8]) -> Result<Option<usize>, DecodeError> {
    let mut walk = Walk { reader: Reader::new(image, kind, bytes)?, unknown: None };
    match kind {
        Kind::Inventory => walk.one::<inventory::InventoryEntry>(),
        Kind::Pstree => walk.all::<pstree::PstreeEntry>(),
        Kind::Core => walk.one::<core::CoreEntry>(),
        Kind::Ids => walk.one::<ids::TaskKobjIdsEntry>(),
        Kind::Mm => walk.one::<mm::MmEntry>(),
        Kind::Pagemap | Kind::ShmemPagemap => {
            walk.one::<pagemap::PagemapHead>()?;
            walk.all::<pagemap::PagemapEntry>()
        }
        Kind::Fdinfo => walk.all::<files::FdinfoEntry>(),
        Kind::Files => walk.all::<files::FileEntry>(),
        Kind::Fs => walk.one::<fs::FsEntry>(),
        Kind::RemapFpath => walk.all::<ghost::RemapFilePathEntry>(),
        Kind::GhostFile => {
            walk.one::<ghost::GhostFileEntry>()?;
            walk.reader.rest();
            Ok(())
        }
        Kind::PipesData | Kind::FifoData => walk.tailed(pipe::PipeDataEntry::tail_length),
        Kind::MemfdInode => walk.all::<memfd::MemfdInodeEntry>(),
        Kind::BpfmapData => walk.tailed(bpfmap::BpfmapDataEntry::tail_length),
        Kind::SkQueues => walk.tailed(sockets::SkPacketEntry::tail_length),
        Kind::TcpStream => walk.tailed(inet::TcpStreamEntry::tail_length),
        Kind::TtyInfo => walk.all::<tty::TtyInfoEntry>(),
        Kind::TtyData => walk.all::<tty::TtyDataEntry>(),
        Kind::FileLocks => walk.all::<file_lock::FileLockEntry>(),
        Kind::Seccomp => walk.one::<seccomp::SeccompEntry>(),
        Kind::Cgroup => walk.one::<cgroup::CgroupEntry>(),
        Kind::Cpuinfo => walk.one::<cpuinfo::CpuinfoEntry>(),
        Kind::Apparmor => walk.one::<apparmor::ApparmorEntry>(),
        Kind::Mnts => walk.all::<mnt::MntEntry>(),
        Kind::Autofs => walk.all::<mnt::AutofsEntry>(),
        Kind::BinfmtMisc => walk.all::<mnt::BinfmtMiscEntry>(),
        Kind::Utsns => walk.one::<ns::UtsnsEntry>(),
        Kind::IpcVar => walk.one::<ipc::IpcVarEntry>(),
        Kind::IpcnsShm => walk.tailed(ipc::IpcShmEntry::tail_length),
        Kind::IpcnsSem => walk.tailed(ipc::IpcSemEntry::tail_length),
        Kind::IpcnsMsg => walk.message_queues(),
        Kind::Netns => walk.one::<net::NetnsEntry>(),
        Kind::Netdev => walk.all::<net::NetDeviceEntry>(),
        Kind::Userns => walk.one::<ns::UsernsEntry>(),
        Kind::Timens => walk.one::<ns::TimensEntry>(),
        Kind::Pidns => walk.one::<ns::PidnsEntry>(),
        Kind::StatsDump | Kind::StatsRestore => walk.one::<stats::StatsEntry>(),
        Kind::IrmapCache => walk.all::<fsnotify::IrmapCacheEntry>(),
        Kind::Pages
        | Kind::TmpfsImg
        | Kind::TmpfsDev
        | Kind::Ifaddr
        | Kind::Route
        | Kind::Route6
        | Kind::Rule
        | Kind::Iptables
        | Kind::Ip6tables
        | Kind::Nftables
        | Kind::NetnsCt
        | Kind::NetnsExp => {
            walk.reader.rest();
            Ok(())
        }
    }?;
    walk.unknown.map_or_else(|| walk.reader.expect_end().map(|()| None), |offset| Ok(Some(offset)))
}

struct Walk<'a> {
    reader: Reader<'a>,
    unknown: Option<usize>,
}

impl Walk<'_> {
    fn next<M: Message + Default>(&mut self) -> Result<Option<M>, DecodeError> {
        let offset = self.reader.offset();
        let Some((message, payload)) = self.reader.next_with_bytes::<M>()? else { return Ok(None) };
        if self.unknown.is_none() && message.encode_to_vec() != payload {
            self.unknown = Some(offset);
        }
        Ok(Some(message))
    }

    fn one<M: Message + Default>(&mut self) -> Result<(), DecodeError> {
        let missing = self.next::<M>()?.is_none();
        if missing { Err(self.reader.empty()) } else { Ok(()) }
    }

    fn all<M: Message + Default>(&mut self) -> Result<(), DecodeError> {
        while self.next::<M>()?.is_some() {}
        Ok(())
    }

    fn tailed<M: Message + Default>(&mut self, tail_length: fn(&M) -> u64) -> Result<(), DecodeError> {
        while let Some(message) = self.next::<M>()? {
            self.reader.tail(tail_length(&message))?;
        }
        Ok(())
    }

    fn message_queues(&mut self) -> Result<(), DecodeError> {
        while let Some(queue) = self.next::<ipc::IpcMsgEntry>()? {
            for _ in 0..queue.qnum {
                let message = self.next::<ipc::IpcMsg>()?.ok_or_else(|| self.reader.empty())?;
                self.reader.tail(message.tail_length())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Encoder, encode};
    use super::*;

    fn queue_image() -> Vec<u8> {
        let mut encoder = Encoder::new(Kind::IpcnsMsg);
        encoder.entry(&ipc::IpcMsgEntry { qnum: 2, qbytes: 16384, ..Default::default() });
        for text in ["one", "fourteen"] {
            let message = ipc::IpcMsg { mtype: 1, msize: text.len() as u32 };
            encoder.entry(&message).tail(&[text.as_bytes(), &[0; 8]].concat()[..message.tail_length() as usize]);
        }
        encoder.finish()
    }

    #[test]
    fn every_kind_of_its_own_making_is_understood() {
        for &kind in Kind::ALL {
            let image = kind.magic();
            match first_unknown(kind, "x", &image) {
                Ok(unknown) => assert_eq!(unknown, None, "{kind:?}"),
                Err(error) => assert!(matches!(error, DecodeError::Empty { .. }), "{kind:?}: {error}"),
            }
        }
        assert_eq!(first_unknown(Kind::IpcnsMsg, "q", &queue_image()).unwrap(), None);
    }

    #[test]
    fn an_unknown_field_and_a_missing_one_are_found() {
        // Field 15, a number, which no namespace message has.
        let image = [Kind::Fs.magic(), vec![6, 0, 0, 0, 8, 1, 16, 2, 120, 1]].concat();
        assert_eq!(first_unknown(Kind::Fs, "fs-1.img", &image).unwrap(), Some(8));
        // Without `root_id`.
        let image = [Kind::Fs.magic(), vec![2, 0, 0, 0, 8, 1]].concat();
        assert_eq!(first_unknown(Kind::Fs, "fs-1.img", &image).unwrap(), Some(8));
        let known = encode(Kind::Fs, &[fs::FsEntry { cwd_id: 1, root_id: 2, umask: Some(18) }]);
        assert_eq!(first_unknown(Kind::Fs, "fs-1.img", &known).unwrap(), None);
    }

    #[test]
    fn truncated_and_flipped_images_are_errors_or_messages() {
        let samples = [
            (Kind::IpcnsMsg, queue_image()),
            (Kind::Pagemap, {
                let mut encoder = Encoder::new(Kind::Pagemap);
                encoder.entry(&pagemap::PagemapHead { pages_id: 1 });
                encoder.entry(&pagemap::PagemapEntry::new(0x7fff_0000_0000, 3, pagemap::page_flags::PRESENT));
                encoder.finish()
            }),
            (Kind::Core, encode(Kind::Core, &[sample_core()])),
        ];
        for (kind, image) in samples {
            assert_eq!(first_unknown(kind, "x", &image).unwrap(), None, "{kind:?}");
            for length in 0..image.len() {
                let _ = first_unknown(kind, "x", &image[..length]);
            }
            for bit in 0..image.len() * 8 {
                let mut flipped = image.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let _ = first_unknown(kind, "x", &flipped);
            }
        }
    }

    fn sample_core() -> core::CoreEntry {
        let registers = core_x86::UserX86RegsEntry { ip: 0x40_1000, mode: Some(1), ..Default::default() };
        let xsave = core_x86::UserX86XsaveEntry { xstate_bv: 7, ymmh_space: vec![9; 64], ..Default::default() };
        let fpregs = core_x86::UserX86FpregsEntry { st_space: vec![1; 32], xsave: Some(xsave), ..Default::default() };
        let machine = core_x86::ThreadInfoX86 { gpregs: registers, fpregs, ..Default::default() };
        let action = signal::SaEntry { sigaction: 1, mask: u64::MAX, ..Default::default() };
        let task =
            core::TaskCoreEntry { comm: b"w\xffrker".to_vec(), sigactions: vec![action; 3], ..Default::default() };
        core::CoreEntry {
            mtype: core::March::X86_64.into(),
            thread_info: Some(machine),
            tc: Some(task),
            thread_core: Some(core::ThreadCoreEntry { sched_nice: Some(-7), ..Default::default() }),
            ..Default::default()
        }
    }
}
