//! Which images there are: their names, and the magic words they begin with.
//!
//! A name is fixed (`files.img`) or made from a number (`core-42.img`). The number is a pid, a namespace's, a pages image's
//! or a file's; ghost files and TCP streams write it in hexadecimal.

use std::fmt;

/// First word of every image but the inventory, raw ones and service ones.
pub const COMMON_MAGIC: u32 = 0x5456_4319;
/// First word of images that are no part of the state: statistics and caches.
pub const SERVICE_MAGIC: u32 = 0x5510_5940;
/// Version of the format with two magic words, as `inventory.img` says it.
pub const IMG_VERSION: u32 = 2;

/// How the name of an image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// There is one in a set.
    One(&'static str),
    /// There is one per number, written in decimal between the two parts.
    PerNumber(&'static str, &'static str),
    /// The same, in lower-case hexadecimal.
    PerHex(&'static str, &'static str),
}

/// How an image begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The image's own word only.
    Single(u32),
    /// [`COMMON_MAGIC`], then the image's own word.
    Common(u32),
    /// [`SERVICE_MAGIC`], then the image's own word.
    Service(u32),
    /// Nothing: the content begins at once.
    Raw,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $naming:expr, $head:expr;)*) => {
        /// The kinds of images.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// Every kind, in the order of the table.
            pub const ALL: &'static [Kind] = &[$(Kind::$kind,)*];

            /// How images of this kind are called.
            pub const fn naming(self) -> Naming {
                use Naming::{One, PerHex, PerNumber};
                match self { $(Kind::$kind => $naming,)* }
            }

            /// How images of this kind begin.
            pub const fn head(self) -> Head {
                use Head::{Common, Raw, Service, Single};
                match self { $(Kind::$kind => $head,)* }
            }
        }
    };
}

kinds! {
    /// What the set holds as a whole.
    Inventory = One("inventory.img"), Single(0x5831_3116);
    /// The process tree.
    Pstree = One("pstree.img"), Common(0x5027_3030);
    /// One thread, by tid.
    Core = PerNumber("core-", ".img"), Common(0x5505_3847);
    /// Object identities of a task, by pid.
    Ids = PerNumber("ids-", ".img"), Common(0x5443_2030);
    /// An address space, by pid.
    Mm = PerNumber("mm-", ".img"), Common(0x5749_2820);
    /// Which pages of a process are saved, by pid.
    Pagemap = PerNumber("pagemap-", ".img"), Common(0x5608_4025);
    /// Which pages of shared memory are saved, by its id.
    ShmemPagemap = PerNumber("pagemap-shmem-", ".img"), Common(0x5608_4025);
    /// Contents of pages, by the number that the pagemap's head says.
    Pages = PerNumber("pages-", ".img"), Raw;
    /// Descriptors, by the number of the descriptor table (`files_id`).
    Fdinfo = PerNumber("fdinfo-", ".img"), Common(0x5621_3732);
    /// Open file descriptions.
    Files = One("files.img"), Common(0x5630_3138);
    /// Working directory and root, by pid.
    Fs = PerNumber("fs-", ".img"), Common(0x5140_3912);
    /// Stand-ins for lost names.
    RemapFpath = One("remap-fpath.img"), Common(0x5913_3954);
    /// A deleted file, by its number, in hexadecimal.
    GhostFile = PerHex("ghost-file-", ".img"), Common(0x5258_3605);
    /// Contents of pipes.
    PipesData = One("pipes-data.img"), Common(0x5645_3709);
    /// Contents of FIFOs.
    FifoData = One("fifo-data.img"), Common(0x5933_3054);
    /// Memfd inodes.
    MemfdInode = One("memfd.img"), Common(0x4845_3499);
    /// Contents of BPF maps.
    BpfmapData = One("bpfmap-data.img"), Common(0x6432_4033);
    /// Packets in receive queues.
    SkQueues = One("sk-queues.img"), Common(0x5626_4026);
    /// A TCP connection, by socket inode, in hexadecimal.
    TcpStream = PerHex("tcp-stream-", ".img"), Common(0x5146_5506);
    /// Terminals.
    TtyInfo = One("tty-info.img"), Common(0x5945_3036);
    /// Unread terminal input.
    TtyData = One("tty-data.img"), Common(0x5941_3026);
    /// File locks.
    FileLocks = One("filelocks.img"), Common(0x5432_3616);
    /// Seccomp filters.
    Seccomp = One("seccomp.img"), Common(0x6441_3049);
    /// Control groups.
    Cgroup = One("cgroup.img"), Common(0x5938_3330);
    /// The processor.
    Cpuinfo = One("cpuinfo.img"), Common(0x6140_4013);
    /// AppArmor policy.
    Apparmor = One("apparmor.img"), Common(0x5942_3047);
    /// Mounts, by namespace.
    Mnts = PerNumber("mountpoints-", ".img"), Common(0x5556_3928);
    /// Content of a tmpfs mount, by mount: a compressed tar.
    TmpfsImg = PerNumber("tmpfs-", ".tar.gz.img"), Raw;
    /// Content of a tmpfs, by device: a compressed tar.
    TmpfsDev = PerNumber("tmpfs-dev-", ".tar.gz.img"), Raw;
    /// An autofs mount, by mount.
    Autofs = PerNumber("autofs-", ".img"), Common(0x4935_3943);
    /// Registered interpreters.
    BinfmtMisc = One("binfmt-misc.img"), Common(0x6734_3323);
    /// Host name, by namespace.
    Utsns = PerNumber("utsns-", ".img"), Common(0x5447_3203);
    /// System V IPC settings, by namespace.
    IpcVar = PerNumber("ipcns-var-", ".img"), Common(0x5311_5007);
    /// Shared memory segments, by namespace.
    IpcnsShm = PerNumber("ipcns-shm-", ".img"), Common(0x4628_3044);
    /// Message queues, by namespace.
    IpcnsMsg = PerNumber("ipcns-msg-", ".img"), Common(0x5545_3737);
    /// Semaphore sets, by namespace.
    IpcnsSem = PerNumber("ipcns-sem-", ".img"), Common(0x5957_3019);
    /// Network settings, by namespace.
    Netns = PerNumber("netns-", ".img"), Common(0x5593_3752);
    /// Links, by namespace.
    Netdev = PerNumber("netdev-", ".img"), Common(0x5737_3951);
    /// Addresses, by namespace: what `ip addr save` writes.
    Ifaddr = PerNumber("ifaddr-", ".img"), Raw;
    /// IPv4 routes, by namespace: what `ip route save` writes.
    Route = PerNumber("route-", ".img"), Raw;
    /// IPv6 routes, by namespace.
    Route6 = PerNumber("route6-", ".img"), Raw;
    /// Routing rules, by namespace: what `ip rule save` writes.
    Rule = PerNumber("rule-", ".img"), Raw;
    /// IPv4 firewall, by namespace: what `iptables-save` writes.
    Iptables = PerNumber("iptables-", ".img"), Raw;
    /// IPv6 firewall, by namespace.
    Ip6tables = PerNumber("ip6tables-", ".img"), Raw;
    /// nftables rules, by namespace.
    Nftables = PerNumber("nftables-", ".img"), Raw;
    /// Connection tracking entries, by namespace: netlink messages.
    NetnsCt = PerNumber("netns-ct-", ".img"), Raw;
    /// Connection tracking expectations, by namespace: netlink messages.
    NetnsExp = PerNumber("netns-exp-", ".img"), Raw;
    /// Id maps, by user namespace.
    Userns = PerNumber("userns-", ".img"), Common(0x5547_4906);
    /// Clocks, by time namespace.
    Timens = PerNumber("timens-", ".img"), Common(0x4311_4433);
    /// External pid namespace, by namespace.
    Pidns = PerNumber("pidns-", ".img"), Common(0x6115_7326);
    /// Measurements of the dump.
    StatsDump = One("stats-dump"), Service(0x5709_3306);
    /// Measurements of the restore.
    StatsRestore = One("stats-restore"), Service(0x5709_3306);
    /// Remembered answers to "which path has this inode".
    IrmapCache = One("irmap-cache"), Service(0x5700_4059);
}

impl Kind {
    /// The name of the only image of this kind.
    ///
    /// For a kind that has one image per number this is a pattern (`core-N.img`), fit for messages only.
    pub fn name(self) -> String {
        match self.naming() {
            Naming::One(name) => name.to_owned(),
            Naming::PerNumber(head, tail) | Naming::PerHex(head, tail) => format!("{head}N{tail}"),
        }
    }

    /// The name of the image of this kind with the given number.
    pub fn name_for(self, number: impl Into<u64>) -> String {
        ImageName { kind: self, number: Some(number.into()) }.to_string()
    }

    /// The magic words, as bytes.
    pub fn magic(self) -> Vec<u8> {
        let words: &[u32] = match &self.head() {
            Head::Single(own) => &[*own],
            Head::Common(own) => &[COMMON_MAGIC, *own],
            Head::Service(own) => &[SERVICE_MAGIC, *own],
            Head::Raw => &[],
        };
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Whether images of this kind are plain bytes.
    pub fn is_raw(self) -> bool {
        self.head() == Head::Raw
    }
}

/// What an image's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName {
    /// The kind.
    pub kind: Kind,
    /// The number, if the kind has one.
    pub number: Option<u64>,
}

impl ImageName {
    /// Reads a name; `None` if no image is called so. Numbers with leading zeros or signs are not names.
    pub fn parse(name: &str) -> Option<Self> {
        Kind::ALL.iter().find_map(|&kind| {
            let number = match kind.naming() {
                Naming::One(fixed) => return (name == fixed).then_some(Self { kind, number: None }),
                Naming::PerNumber(head, tail) => between(name, head, tail)?.parse().ok()?,
                Naming::PerHex(head, tail) => u64::from_str_radix(between(name, head, tail)?, 16).ok()?,
            };
            let parsed = Self { kind, number: Some(number) };
            (parsed.to_string() == name).then_some(parsed)
        })
    }
}

fn between<'a>(name: &'a str, head: &str, tail: &str) -> Option<&'a str> {
    name.strip_prefix(head)?.strip_suffix(tail)
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.number.unwrap_or(0);
        match self.kind.naming() {
            Naming::One(name) => f.write_str(name),
            Naming::PerNumber(head, tail) => write!(f, "{head}{number}{tail}"),
            Naming::PerHex(head, tail) => write!(f, "{head}{number:x}{tail}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_as_itself() {
        for &kind in Kind::ALL {
            for number in [0, 1, 10, 171, u64::MAX] {
                let number = if matches!(kind.naming(), Naming::One(_)) { None } else { Some(number) };
                let name = ImageName { kind, number };
                assert_eq!(ImageName::parse(&name.to_string()), Some(name));
            }
        }
    }

    #[test]
    fn names_that_only_resemble_are_refused() {
        for name in
            ["core-.img", "core-01.img", "core-+1.img", "core--1.img", "core-1.img.img", "core-1", "tcp-stream-AB.img"]
        {
            assert_eq!(ImageName::parse(name), None, "{name}");
        }
        assert_eq!(Kind::TcpStream.name_for(171u32), "tcp-stream-ab.img");
        assert_eq!(ImageName::parse("pagemap-shmem-7.img").map(|name| name.kind), Some(Kind::ShmemPagemap));
    }

    #[test]
    fn magic_words_are_little_endian_and_framed() {
        assert_eq!(Kind::Inventory.magic(), [0x16, 0x31, 0x31, 0x58]);
        assert_eq!(Kind::Core.magic(), [0x19, 0x43, 0x56, 0x54, 0x47, 0x38, 0x05, 0x55]);
        assert_eq!(Kind::StatsDump.magic()[..4], [0x40, 0x59, 0x10, 0x55]);
        assert!(Kind::Pages.magic().is_empty());
    }

    #[test]
    fn the_reference_lists_every_kind_with_its_magic() {
        let page = include_str!("../../../docs/images.md");
        for &kind in Kind::ALL {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", kind.name())));
            let magic = row.and_then(|row| row.split(" | ").last()).unwrap_or_else(|| panic!("{kind:?} has no row"));
            let expected = match kind.head() {
                Head::Raw => "none |".to_owned(),
                Head::Common(own) => format!("`{own:#010x}` |"),
                Head::Service(own) => format!("service `{own:#010x}` |"),
                Head::Single(own) => format!("alone `{own:#010x}` |"),
            };
            assert_eq!(magic, expected, "{kind:?}");
        }
    }
}
