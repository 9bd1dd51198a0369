//! The SELinux context that a file system was mounted with (`context=` of mount(8)), replaced by another at a restore.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Mount options with another context, if they have one and another is wanted.
pub fn with_context(options: &OsStr, wanted: Option<&str>) -> OsString {
    const KEY: &[u8] = b"context=";
    let bytes = options.as_bytes();
    let at = (0..bytes.len()).find(|at| (*at == 0 || bytes[*at - 1] == b',') && bytes[*at..].starts_with(KEY));
    let (Some(at), Some(wanted)) = (at, wanted) else { return options.to_owned() };
    let (before, value) = bytes.split_at(at + KEY.len());
    // What stands in quotes may have commas.
    let quoted = value.strip_prefix(b"\"").and_then(|rest| rest.iter().position(|byte| *byte == b'"'));
    let after = quoted.map_or(0, |close| close + 2);
    let end = value[after..].iter().position(|byte| *byte == b',').map_or(value.len(), |comma| after + comma);
    OsString::from_vec([before, b"\"", wanted.as_bytes(), b"\"", &value[end..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_context_is_replaced() {
        for (options, replaced) in [
            (r#"context="a:b:c:s0:c1,c2",inode64"#, r#"context="new",inode64"#),
            (r#"size=1,context="a,b""#, r#"size=1,context="new""#),
            ("context=plain,mode=1", r#"context="new",mode=1"#),
            ("rootcontext=a,size=1", "rootcontext=a,size=1"),
            ("", ""),
            (r#"context="open"#, r#"context="new""#),
        ] {
            assert_eq!(with_context(OsStr::new(options), Some("new")), replaced);
            assert_eq!(with_context(OsStr::new(options), None), options);
        }
    }
}
