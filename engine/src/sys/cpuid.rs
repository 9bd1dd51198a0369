//! CPUID leaf 0xD: where the processor keeps each component of the extended state.
//!
//! Intel SDM volume 1, 13.2 and 13.4: for a component `n` of 2 and above, sub-leaf `n` gives its size (EAX) and its
//! offset in the standard format (EBX); bit 0 of ECX tells that only the kernel may use it. Bits 0 and 1, x87 and SSE, lie
//! in the legacy region at fixed places. The standard format is what ptrace(2) transfers as `NT_X86_XSTATE`.

use std::ops::Range;
use std::sync::OnceLock;

/// First bytes that belong to no fixed region: legacy area, then header.
pub const EXTENDED_START: usize = 576;

const LEAF: u32 = 0xd;
const COMPONENTS: usize = 64;

/// Where the components lie that this processor has and programs may use.
#[derive(Clone, Debug, Default)]
pub struct XsaveLayout {
    ranges: Vec<Range<usize>>,
}

impl XsaveLayout {
    /// The layout of the processor that this runs on; all processors of a machine share it.
    ///
    /// Read once: in a virtual machine each CPUID instruction costs a trip to the hypervisor.
    pub fn of_this_machine() -> &'static Self {
        static LAYOUT: OnceLock<XsaveLayout> = OnceLock::new();
        LAYOUT.get_or_init(Self::read)
    }

    #[cfg(target_arch = "x86_64")]
    fn read() -> Self {
        use std::arch::x86_64::__cpuid_count;
        let mut ranges = vec![0..0; COMPONENTS];
        if !std::arch::is_x86_feature_detected!("xsave") {
            return Self { ranges };
        }
        let enabled = __cpuid_count(LEAF, 0);
        let enabled = u64::from(enabled.eax) | u64::from(enabled.edx) << 32;
        for (component, range) in ranges.iter_mut().enumerate().skip(2) {
            if enabled >> component & 1 == 1 {
                let leaf = __cpuid_count(LEAF, component as u32);
                if leaf.ecx & 1 == 0 {
                    *range = leaf.ebx as usize..(leaf.ebx + leaf.eax) as usize;
                }
            }
        }
        Self { ranges }
    }

    /// Where component `number` lies in an xsave area; none when this processor lacks it.
    pub fn range(&self, number: u32) -> Option<Range<usize>> {
        self.ranges.get(number as usize).filter(|range| !range.is_empty()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_lie_behind_the_header_without_overlap() {
        let layout = XsaveLayout::of_this_machine();
        let mut ranges: Vec<_> = (0..64).filter_map(|number| layout.range(number)).collect();
        ranges.sort_by_key(|range| range.start);
        assert_eq!(layout.range(1), None, "the legacy region is not asked for");
        assert!(ranges.iter().all(|range| range.start >= EXTENDED_START));
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
    }
}
