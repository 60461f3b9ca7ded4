//! Paths as the stream has them: components, checked.

use crate::error::{Error, Result};
use crate::limits::{DEPTH_MAX, NAME_MAX, PATH_MAX};

/// The components of an entry's path, each of them a plain name. A leading `./` and a trailing
/// slash are dropped, so `.` and `./` have none.
pub fn components(path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let refuse = |cause: String| Err(Error::refused(path, cause));
    if path.len() > PATH_MAX {
        return refuse(format!("its name is longer than {PATH_MAX} bytes"));
    }
    if path.is_empty() {
        return refuse("it has no name".into());
    }
    if path[0] == b'/' {
        return refuse("its name is absolute".into());
    }
    let mut rest = path.strip_suffix(b"/").unwrap_or(path);
    if rest == b"." {
        return Ok(Vec::new());
    }
    rest = rest.strip_prefix(b"./").unwrap_or(rest);
    let found: Vec<Vec<u8>> = rest
        .split(|byte| *byte == b'/')
        .map(<[u8]>::to_vec)
        .collect();
    if found.len() > DEPTH_MAX {
        return refuse(format!("it is more than {DEPTH_MAX} directories deep"));
    }
    for component in &found {
        match component.as_slice() {
            b"" => return refuse("its name has an empty part".into()),
            b"." | b".." => return refuse("its name has a part that is . or ..".into()),
            name if name.contains(&0) => return refuse("its name has a zero byte".into()),
            name if name.len() > NAME_MAX => {
                return refuse(format!(
                    "a part of its name is longer than {NAME_MAX} bytes"
                ));
            }
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_plain_names() {
        let parts = |path: &[u8]| components(path).unwrap().len();
        assert_eq!(parts(b"a/b"), 2);
        assert_eq!(parts(b"./a/"), 1);
        assert_eq!(parts(b"./"), 0);
        assert_eq!(parts(b"."), 0);
        assert_eq!(components(b"\xff/\x1b[31m").unwrap()[0], b"\xff");
        assert_eq!(parts(b"..."), 1);
    }

    #[test]
    fn refuses_what_leads_elsewhere() {
        let long = [b'a'; 256];
        let deep = b"a/".repeat(257);
        for path in [
            &b"/etc"[..],
            b"..",
            b"a/../b",
            b"../a",
            b"a/..",
            b"a//b",
            b"./..",
            b"",
            b"a/./b",
            b"a\0b",
            b"//",
            b"././a",
            &long,
            &deep,
            &[b'x'; 5000],
        ] {
            assert!(components(path).is_err(), "{}", path.escape_ascii());
        }
    }
}
