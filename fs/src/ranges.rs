//! The byte ranges of a file that one owner has locked. The kernel of the host has them, too; this copy counts them, so
//! that a guest cannot fill the memory of the host with locks.

/// The type of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// A shared lock.
    Read,
    /// An exclusive lock.
    Write,
}

/// A locked range, from `start` to `end` inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) kind: LockKind,
}

/// Ordered ranges that do not overlap. Adjacent ranges of the same type are merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range>);

impl Ranges {
    /// The ranges after a range was locked, or unlocked if `kind` is none.
    pub(crate) fn with(&self, start: u64, end: u64, kind: Option<LockKind>) -> Self {
        let mut ranges = Vec::with_capacity(self.0.len() + 2);
        for range in &self.0 {
            if range.start < start {
                ranges.push(Range { end: range.end.min(start - 1), ..*range });
            }
            if range.end > end {
                ranges.push(Range { start: range.start.max(end + 1), ..*range });
            }
        }
        ranges.extend(kind.map(|kind| Range { start, end, kind }));
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, range| {
            let is_one = next.kind == range.kind && next.start - 1 == range.end;
            if is_one {
                range.end = next.end;
            }
            is_one
        });
        Self(ranges)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Range> {
        self.0.iter()
    }

    /// Whether a byte is locked.
    pub(crate) fn contains(&self, byte: u64) -> bool {
        self.0.iter().any(|range| (range.start..=range.end).contains(&byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_map_of_bytes(
            calls in prop::collection::vec(
                (0..12_u64, 0..12_u64, prop::option::of(prop::bool::ANY)), 0..20
            ),
        ) {
            let (mut ranges, mut bytes) = (Ranges::default(), [None; 12]);
            for (start, end, kind) in calls {
                let (start, end) = (start.min(end), start.max(end));
                let kind = kind.map(|reads| if reads { LockKind::Read } else { LockKind::Write });
                ranges = ranges.with(start, end, kind);
                for byte in start..=end {
                    bytes[usize::try_from(byte).unwrap()] = kind;
                }
            }
            for (byte, kind) in (0..).zip(bytes) {
                let found: Vec<_> =
                    ranges.0.iter().filter(|range| (range.start..=range.end).contains(&byte)).collect();
                prop_assert!(found.len() <= 1);
                prop_assert_eq!(found.first().map(|range| range.kind), kind);
                prop_assert_eq!(ranges.contains(byte), kind.is_some());
            }
            let changes = bytes.windows(2).filter(|pair| pair[0] != pair[1] && pair[1].is_some()).count();
            prop_assert_eq!(ranges.len(), changes + usize::from(bytes[0].is_some()));
            prop_assert_eq!(ranges.is_empty(), bytes.iter().all(Option::is_none));
        }
    }

    #[test]
    fn a_range_may_end_at_the_largest_number() {
        let all = Ranges::default().with(0, u64::MAX, Some(LockKind::Read));
        let ranges = all.with(5, u64::MAX, Some(LockKind::Write));
        assert_eq!((all.len(), ranges.len()), (1, 2));
        assert!(ranges.with(0, u64::MAX, None).is_empty());
    }
}
