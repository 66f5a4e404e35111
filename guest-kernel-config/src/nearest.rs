//! Suggestions for misspelt symbol names.

/// The candidate with the smallest edit distance to a name, within a limit. Of equally near candidates, the first.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // One mistake per four letters; with more, a suggestion would be a guess.
    let limit = (name.len() / 4).clamp(1, 4);
    candidates
        .filter(|candidate| candidate.len().abs_diff(name.len()) <= limit)
        .map(|candidate| (distance(name.as_bytes(), candidate.as_bytes()), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The Damerau-Levenshtein distance (optimal string alignment): the number of letters to insert, remove, replace or
/// swap with their neighbour.
fn distance(from: &[u8], to: &[u8]) -> usize {
    // rows[i][j] is the distance of the first i letters of one name to the first j of the other.
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let same = |a: usize, b: usize| from[a].eq_ignore_ascii_case(&to[b]);
            let replaced = rows[i - 1][j - 1] + usize::from(!same(i - 1, j - 1));
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && same(i - 1, j - 2) && same(i - 2, j - 1) {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let cases = [
            ("", "", 0),
            ("ABC", "", 3),
            ("", "ABC", 3),
            ("NET", "NET", 0),
            ("NET", "NEST", 1),
            ("VIRTOI", "VIRTIO", 1),
            ("KITTEN", "SITTING", 3),
        ];
        for (from, to, expected) in cases {
            assert_eq!(distance(from.as_bytes(), to.as_bytes()), expected, "{from} {to}");
        }
    }

    #[test]
    fn only_near_names_are_suggested() {
        let names = ["NET", "VIRTIO_BLK", "VIRTIO_MEM", "VIRTIO_MMIO", "VIRTIO_NET"];
        let cases = [
            ("VIRTIO_MIMO", Some("VIRTIO_MMIO")),
            ("VIRTIOBLK", Some("VIRTIO_BLK")),
            ("virtio_net", Some("VIRTIO_NET")),
            ("NOSUCH", None),
            ("X", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(nearest(name, names.into_iter()), expected, "{name}");
        }
    }
}
