//! `cpuinfo.img`: what the processor of a dump could do, to be compared with the one that the tree is to run on.
//!
//! The image has the words that CPUID gives, in an order of its own ([`WORDS`]), which was Linux's once (arch/x86/include/asm/cpufeatures.h)
//! and is the format's now. Facts: Intel SDM volume 2, CPUID; AMD64 APM volume 3, appendix E. Only x86 has it.

use std::fmt;

use crate::images::cpuinfo::{CpuVendor, CpuinfoEntry, CpuinfoX86Entry};

/// Words of the second version of the format; the first has no more than [`WORDS_OF_VERSION_1`].
const WORDS: usize = 19;
const WORDS_OF_VERSION_1: usize = 12;
const VERSION: u32 = 2;

/// What the words are: CPUID leaf, sub-leaf, register. None for those that no processor gives.
mod word {
    pub const LEAF_1_EDX: usize = 0;
    pub const EXTENDED_1_EDX: usize = 1;
    pub const LINUX: usize = 3;
    pub const LEAF_1_ECX: usize = 4;
    pub const EXTENDED_1_ECX: usize = 6;
    pub const LEAF_7_EBX: usize = 9;
    pub const XSAVE: usize = 10;
    pub const LEAF_7_ECX: usize = 11;
    pub const LEAF_F_1_EDX: usize = 12;
    pub const EXTENDED_8_EBX: usize = 13;
    pub const LEAF_6_EAX: usize = 14;
    pub const EXTENDED_A_EDX: usize = 15;
    pub const LEAF_F_EDX: usize = 16;
    pub const EXTENDED_7_EBX: usize = 17;
    pub const LEAF_7_EDX: usize = 18;
}

/// Bits that name instructions which a program may have found and go on to use. What only an operating system or a hypervisor uses
/// does not matter to a program that moves.
const INSTRUCTIONS: [(usize, &[u32]); 10] = [
    // FPU, TSC, CX8, SEP, CMOV, CLFSH, MMX, FXSR, SSE, SSE2.
    (word::LEAF_1_EDX, &[0, 4, 8, 11, 15, 19, 23, 24, 25, 26]),
    // SYSCALL, MMXEXT, RDTSCP, 3DNOWEXT, 3DNOW.
    (word::EXTENDED_1_EDX, &[11, 22, 27, 30, 31]),
    // SSE3, PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
    (word::LEAF_1_ECX, &[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30]),
    // LAHF, ABM, SSE4A, MISALIGNSSE, 3DNOWPREFETCH, XOP, FMA4, TBM.
    (word::EXTENDED_1_ECX, &[0, 5, 6, 7, 8, 11, 16, 21]),
    // FSGSBASE, BMI1, HLE, AVX2, BMI2, ERMS, RTM, MPX, AVX512F, DQ, RDSEED, ADX, IFMA, CLFLUSHOPT, CLWB, PF, ER, CD, SHA, BW, VL.
    (word::LEAF_7_EBX, &[0, 3, 4, 5, 8, 9, 11, 14, 16, 17, 18, 19, 21, 23, 24, 26, 27, 28, 29, 30, 31]),
    // XSAVEOPT, XSAVEC, XGETBV1.
    (word::XSAVE, &[0, 1, 2]),
    // AVX512VBMI, PKU, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, RDPID, MOVDIRI, MOVDIR64B.
    (word::LEAF_7_ECX, &[1, 3, 6, 8, 9, 10, 11, 12, 14, 22, 27, 28]),
    // CLZERO.
    (word::EXTENDED_8_EBX, &[0]),
    // AVX512_4VNNIW, 4FMAPS, FSRM, VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8.
    (word::LEAF_7_EDX, &[2, 3, 4, 8, 22, 23, 24, 25]),
    // REP_GOOD, NOPL.
    (word::LINUX, &[16, 20]),
];

/// FPU, FXSR, OSXSAVE, XSAVES: how registers are saved.
const REGISTERS: [(usize, u32); 4] =
    [(word::LEAF_1_EDX, 0), (word::LEAF_1_EDX, 24), (word::LEAF_1_ECX, 27), (word::XSAVE, 3)];

/// The components of the extended state that images name, and the feature that each belongs to. CRIU 4.2 names neither 1 (SSE, which
/// every processor has) nor 3 (MPX, which none has any more) and does not accept images that do.
const COMPONENTS: [(u32, usize, u32); 7] = [
    (0, word::LEAF_1_EDX, 0),
    (2, word::LEAF_1_ECX, 28),
    (4, word::LEAF_7_EBX, 14),
    (5, word::LEAF_7_EBX, 16),
    (6, word::LEAF_7_EBX, 16),
    (7, word::LEAF_7_EBX, 16),
    (9, word::LEAF_7_ECX, 3),
];

/// What of two processors is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// That registers are saved in the same way and have the same size.
    pub registers: bool,
    /// That every instruction of the dump's is there.
    pub instructions: bool,
    /// That all features are the same.
    pub exactly: bool,
}

impl Compared {
    /// Nothing.
    pub const NONE: Self = Self { registers: false, instructions: false, exactly: false };
    /// What is compared unless told otherwise.
    pub const USUAL: Self = Self { registers: true, instructions: true, exactly: false };
    /// Everything.
    pub const ALL: Self = Self { registers: true, instructions: true, exactly: true };
}

/// Why processors could not be compared, or differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum CpuError {
    #[error("cpuinfo.img exists for x86 processors of Intel and AMD only")]
    NotHere,
    #[error("cpuinfo.img: {0}")]
    Damaged(&'static str),
    #[error("this processor is not like that of the dump: {}; --cpu-cap says what must be alike", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Differs(Vec<Difference>),
}

/// One thing in which the processors differ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum Difference {
    SavesRegisters,
    Components(u64),
    AreaSize(u32, u32),
    Instructions { word: usize, bits: u32 },
    Features { word: usize, bits: u32 },
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SavesRegisters => write!(out, "it saves registers otherwise"),
            Self::Components(bits) => write!(out, "it lacks components {bits:#x} of the extended state"),
            Self::AreaSize(theirs, ours) => write!(out, "its extended state takes {ours} bytes, not {theirs}"),
            Self::Instructions { word, bits } => write!(out, "it lacks instructions (word {word}, bits {bits:#x})"),
            Self::Features { word, bits } => write!(out, "features differ (word {word}, bits {bits:#x})"),
        }
    }
}

/// The processor that this runs on.
///
/// # Errors
/// [`CpuError::NotHere`].
#[cfg(target_arch = "x86_64")]
pub fn collect() -> Result<CpuinfoEntry, CpuError> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let first = __cpuid(0);
    let name = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes).concat();
    let vendor = match name.as_slice() {
        b"GenuineIntel" => CpuVendor::Intel,
        b"AuthenticAMD" | b"HygonGenuine" => CpuVendor::Amd,
        _ => return Err(CpuError::NotHere),
    };
    let last_extended = __cpuid(0x8000_0000).eax;
    // A leaf beyond the last gives what another gives.
    let leaf = |number: u32, sub: u32| {
        let last = if number < 0x8000_0000 { first.eax } else { last_extended };
        (number <= last).then(|| __cpuid_count(number, sub))
    };
    let mut words = [0u32; WORDS];
    let mut set = |word: usize, value: Option<u32>| words[word] = value.unwrap_or(0);
    let one = leaf(1, 0);
    set(word::LEAF_1_EDX, one.map(|leaf| leaf.edx));
    set(word::LEAF_1_ECX, one.map(|leaf| leaf.ecx));
    set(word::LEAF_6_EAX, leaf(6, 0).map(|leaf| leaf.eax));
    let seven = leaf(7, 0);
    set(word::LEAF_7_EBX, seven.map(|leaf| leaf.ebx));
    set(word::LEAF_7_ECX, seven.map(|leaf| leaf.ecx));
    set(word::LEAF_7_EDX, seven.map(|leaf| leaf.edx));
    set(word::XSAVE, leaf(0xd, 1).map(|leaf| leaf.eax));
    let monitoring = leaf(0xf, 0).map(|leaf| leaf.edx);
    set(word::LEAF_F_EDX, monitoring);
    // Bit 1: monitoring of the last-level cache, which the next sub-leaf describes.
    set(word::LEAF_F_1_EDX, leaf(0xf, 1).filter(|_| monitoring.is_some_and(|bits| bits & 2 != 0)).map(|leaf| leaf.edx));
    let extended = leaf(0x8000_0001, 0);
    set(word::EXTENDED_1_ECX, extended.map(|leaf| leaf.ecx));
    set(word::EXTENDED_1_EDX, extended.map(|leaf| leaf.edx));
    set(word::EXTENDED_7_EBX, leaf(0x8000_0007, 0).map(|leaf| leaf.ebx));
    set(word::EXTENDED_8_EBX, leaf(0x8000_0008, 0).map(|leaf| leaf.ebx));
    set(word::EXTENDED_A_EDX, leaf(0x8000_000a, 0).map(|leaf| leaf.edx));
    let signature = one.map_or(0, |leaf| leaf.eax);
    let mut family = signature >> 8 & 0xf;
    if family == 0xf {
        family += signature >> 20 & 0xff;
    }
    let mut model = signature >> 4 & 0xf;
    if family >= 6 {
        model += (signature >> 16 & 0xf) << 4;
    }
    // NOPL and CPUID: every processor of 64 bits has them.
    words[word::LINUX] |= 1 << 20 | 1 << 25;
    if vendor == CpuVendor::Intel && family == 6 || vendor == CpuVendor::Amd && family >= 0x10 {
        words[word::LINUX] |= 1 << 16;
    }
    if vendor == CpuVendor::Amd {
        // AMD's 3DNow has its place in another word.
        words[word::LEAF_1_EDX] &= !(1 << 31);
    }
    let area = leaf(0xd, 0).filter(|_| words[word::LEAF_1_ECX] & 1 << 26 != 0);
    let enabled = area.map_or(0, |area| u64::from(area.eax) | u64::from(area.edx) << 32);
    let usable = COMPONENTS.iter().filter(|(_, word, bit)| words[*word] >> bit & 1 == 1);
    let usable = usable.fold(0u64, |mask, (component, ..)| mask | 1 << component);
    let brand = (0x8000_0002..=0x8000_0004).filter_map(|number| leaf(number, 0));
    let brand: Vec<u8> =
        brand.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes)).flatten().collect();
    let brand = String::from_utf8_lossy(&brand).trim_matches(['\0', ' ']).to_owned();
    Ok(CpuinfoEntry {
        x86_entry: vec![CpuinfoX86Entry {
            vendor_id: vendor as i32,
            cpu_family: family,
            model,
            stepping: signature & 0xf,
            capability_ver: VERSION,
            capability: words.to_vec(),
            model_id: (!brand.is_empty()).then_some(brand),
            xfeatures_mask: Some(enabled & usable),
            xsave_size: Some(area.map_or(0, |area| area.ebx)),
            xsave_size_max: Some(area.map_or(0, |area| area.ecx)),
        }],
    })
}

/// The processor that this runs on.
///
/// # Errors
/// [`CpuError::NotHere`].
#[cfg(not(target_arch = "x86_64"))]
pub fn collect() -> Result<CpuinfoEntry, CpuError> {
    Err(CpuError::NotHere)
}

/// Whether a tree that was dumped where `image` was made may run on `here`.
///
/// # Errors
/// All differences, or what is wrong with the image.
pub fn compare(image: &CpuinfoEntry, here: &CpuinfoEntry, compared: Compared) -> Result<(), CpuError> {
    let ([theirs], [ours]) = (image.x86_entry.as_slice(), here.x86_entry.as_slice()) else {
        return Err(CpuError::Damaged("it does not describe one x86 processor"));
    };
    let known = match theirs.capability_ver {
        1 => WORDS_OF_VERSION_1,
        VERSION => WORDS,
        _ => return Err(CpuError::Damaged("it has a version that is not known")),
    };
    if theirs.capability.len() != known || ours.capability.len() < known {
        return Err(CpuError::Damaged("it has not as many words as its version says"));
    }
    let pairs = || theirs.capability.iter().zip(&ours.capability).enumerate();
    let mut differences = Vec::new();
    if compared.registers {
        let lacks = |(word, bit): &(usize, u32)| theirs.capability[*word] & !ours.capability[*word] & 1 << bit != 0;
        if REGISTERS.iter().any(lacks) {
            differences.push(Difference::SavesRegisters);
        }
        // What an old image does not say is taken to be the same.
        let missing = theirs.xfeatures_mask.unwrap_or(0) & !ours.xfeatures_mask.unwrap_or(u64::MAX);
        if missing != 0 {
            differences.push(Difference::Components(missing));
        }
        for (theirs, ours) in [(theirs.xsave_size, ours.xsave_size), (theirs.xsave_size_max, ours.xsave_size_max)] {
            if let (Some(theirs), Some(ours)) = (theirs, ours)
                && theirs != ours
            {
                differences.push(Difference::AreaSize(theirs, ours));
            }
        }
    }
    if compared.instructions {
        for (word, (theirs, ours)) in pairs() {
            let named = INSTRUCTIONS.iter().filter(|(of, _)| *of == word).flat_map(|(_, bits)| bits.iter());
            let bits = theirs & !ours & named.fold(0u32, |mask, bit| mask | 1 << bit);
            if bits != 0 {
                differences.push(Difference::Instructions { word, bits });
            }
        }
    }
    if compared.exactly {
        let differ = pairs().filter(|(_, (theirs, ours))| theirs != ours);
        differences.extend(differ.map(|(word, (theirs, ours))| Difference::Features { word, bits: theirs ^ ours }));
    }
    if differences.is_empty() { Ok(()) } else { Err(CpuError::Differs(differences)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_like_itself_and_differences_are_told_by_kind() {
        let here = collect().unwrap();
        assert_eq!(compare(&here, &here, Compared::ALL), Ok(()));
        let words = &here.x86_entry[0].capability;
        assert!(words[word::LEAF_1_EDX] & 1 << 26 != 0, "every processor of 64 bits has SSE2");
        let other = |change: fn(&mut CpuinfoX86Entry)| {
            let mut other = here.clone();
            change(&mut other.x86_entry[0]);
            other
        };
        // An instruction that no processor has any more beside those that this has: 3DNOW of AMD's, and a bit that is none.
        let more = other(|entry| entry.capability[word::EXTENDED_1_ECX] |= 1 << 16 | 1 << 30);
        let lacks = Difference::Instructions { word: word::EXTENDED_1_ECX, bits: 1 << 16 };
        assert_eq!(compare(&more, &here, Compared::USUAL), Err(CpuError::Differs(vec![lacks])));
        assert_eq!(compare(&more, &here, Compared { instructions: false, ..Compared::USUAL }), Ok(()));
        assert_eq!(compare(&more, &here, Compared::NONE), Ok(()));
        let less = other(|entry| entry.capability[word::LEAF_7_EBX] = 0);
        assert_eq!(compare(&less, &here, Compared::USUAL), Ok(()));
        assert!(compare(&less, &here, Compared::ALL).is_err());
        let wider = other(|entry| entry.xfeatures_mask = Some(1 << 40));
        assert_eq!(
            compare(&wider, &here, Compared::USUAL),
            Err(CpuError::Differs(vec![Difference::Components(1 << 40)]))
        );
    }

    #[test]
    fn images_that_say_too_little_are_damaged() {
        let here = collect().unwrap();
        let mut old = here.clone();
        old.x86_entry[0].capability_ver = 1;
        assert!(matches!(compare(&old, &here, Compared::USUAL), Err(CpuError::Damaged(_))));
        old.x86_entry[0].capability.truncate(WORDS_OF_VERSION_1);
        assert_eq!(compare(&old, &here, Compared::USUAL), Ok(()));
        old.x86_entry.clear();
        assert!(matches!(compare(&old, &here, Compared::USUAL), Err(CpuError::Damaged(_))));
    }
}
