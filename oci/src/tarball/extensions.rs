//! Extended headers, which precede the header of a tar entry: pax records and GNU long names.
//!
//! The length of a pax record is explicit. A newline does not end it, since binary values such as capabilities may
//! contain one.

use super::sparse::{self, decimal};
use crate::tree::{Excerpt, Time, Xattr};

/// The contents of the extended headers of an entry.
#[derive(Debug, Default)]
pub(crate) struct Extensions {
    pub(crate) pax: Pax,
    /// GNU's long names, which take precedence over those of pax.
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
}

/// The records of a pax header. A later header replaces an earlier one.
#[derive(Debug, Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<i128>,
    pub(crate) uid: Option<i128>,
    pub(crate) gid: Option<i128>,
    pub(crate) mtime: Option<Time>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: Option<sparse::Extension>,
}

/// A malformed record, or one with an invalid value.
#[derive(Debug)]
pub(crate) struct InvalidRecord(pub(crate) Excerpt);

impl Pax {
    /// Parses records of the form `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    pub(crate) fn parse(mut records: &[u8]) -> Result<Self, InvalidRecord> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) = split(records).ok_or_else(|| InvalidRecord(Excerpt::new(records)))?;
            pax.record(key, value)
                .ok_or_else(|| InvalidRecord(Excerpt::new(&records[..records.len() - rest.len()])))?;
            records = rest;
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        // A record without a value cancels an earlier one.
        let given = !value.is_empty();
        let number = || if given { decimal(value).map(Some) } else { Some(None) };
        match key {
            b"path" => self.path = given.then(|| value.to_vec()),
            b"linkpath" => self.link = given.then(|| value.to_vec()),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = if given { Some(time(value)?) } else { None },
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    // overlayfs in a guest would interpret these as its own attributes.
                    if !name.starts_with(b"trusted.overlay.") {
                        self.xattrs.push(Xattr { name: name.into(), value: value.into() });
                    }
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.")
                    && given
                {
                    self.sparse.get_or_insert_default().record(key, value)?;
                }
            }
        }
        Some(())
    }
}

/// Key and value of the first record, and the remaining records.
fn split(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&records[..space])?).ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=').filter(|&equals| equals > 0)?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.contains(&0)).then_some((key, value, rest))
}

/// Parses seconds with a fraction, such as `-12.5`, and clamps them to what a filesystem can hold.
fn time(value: &[u8]) -> Option<Time> {
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = decimal(parts.next()?)?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = (0..9).map(|index| u32::from(fraction.get(index).unwrap_or(&b'0') - b'0'));
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + digit);
    // Nanoseconds are added to the seconds, also before 1970.
    Some(if value.starts_with(b"-") && nanoseconds > 0 {
        Time::clamped(seconds.saturating_sub(1), 1_000_000_000 - nanoseconds)
    } else {
        Time::clamped(seconds, nanoseconds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_may_be_before_1970() {
        let is = |text: &[u8], seconds, nanoseconds| {
            assert_eq!(time(text), Some(Time { seconds, nanoseconds }), "{}", text.escape_ascii());
        };
        is(b"0", 0, 0);
        is(b"+5", 5, 0);
        is(b"1700000000.5", 1_700_000_000, 500_000_000);
        is(b"1700000000.", 1_700_000_000, 0);
        is(b"1.0000000019", 1, 1);
        is(b"-1", -1, 0);
        is(b"-1.25", -2, 750_000_000);
        is(b"-0.5", -1, 500_000_000);
        is(b"-9223372036854775808", i64::MIN, 0);
        is(b"-9223372036854775808.5", i64::MIN, 0);
        is(b"9223372036854775807.5", i64::MAX, 500_000_000);
        is(b"9223372036854775808.5", i64::MAX, 0);
        is("9".repeat(100).as_bytes(), i64::MAX, 0);
        is(format!("-{}.5", "9".repeat(100)).as_bytes(), i64::MIN, 0);
        for wrong in [&b""[..], b"-", b"x", b"1.x", b"1e3", b"1.-5", b".5", b" 1", b"1_0", b"--1"] {
            assert_eq!(time(wrong), None, "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn records_have_an_explicit_length() {
        let pax = Pax::parse(b"29 SCHILY.xattr.user.a=1\n2=3\n11 path=ab\n0000000000000000000000032 uid=7\n")
            .unwrap();
        assert_eq!((pax.path.as_deref(), pax.uid), (Some(&b"ab"[..]), Some(7)));
        let Xattr { name, value } = &pax.xattrs[0];
        assert_eq!((&**name, &**value), (&b"user.a"[..], &b"1\n2=3"[..]));
        for wrong in [
            &b"11 path=a\n"[..],
            b"9 path=ab\n",
            b"0 path=ab\n",
            b"-11 path=ab\n",
            b"99999999999999999999 path=ab\n",
            b"path",
            b"6 abc\n",
            b"5 =a\n",
            b"9 a\0b=cd\n",
            b"9 uid=1a\n",
            b"9 gid=0x\n",
            b"9 size=\n\n",
            b"31 GNU.sparse.numbytes=1234567\n",
        ] {
            assert!(Pax::parse(wrong).is_err(), "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn records_without_a_value_cancel_earlier_ones() {
        let pax = Pax::parse(
            b"9 path=a\n8 path=\n9 uid=12\n7 uid=\n7 gid=\n8 size=\n9 mtime=\n13 linkpath=\n19 GNU.sparse.map=\n",
        );
        let pax = pax.unwrap();
        assert_eq!((pax.path, pax.link, pax.size, pax.uid, pax.gid), (None, None, None, None, None));
        assert!(pax.mtime.is_none() && pax.sparse.is_none());
    }
}
