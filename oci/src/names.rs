//! Lookup of images in a layout or an archive by tag.

use crate::reference::Reference;

/// How a tag matches the name of an image, the better match first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum MatchKind {
    /// It is the same name, possibly in another spelling.
    Exact,
    /// It is a suffix of the name, after `/` or `:`.
    Suffix,
}

/// The images whose names match a tag best.
pub(crate) fn matching<'a, T>(tag: &str, images: &'a [T], names: impl Fn(&T) -> Vec<String>) -> Vec<&'a T> {
    let matches: Vec<_> = images
        .iter()
        .map(|image| names(image).iter().filter_map(|name| match_kind(tag, name)).min())
        .collect();
    let best = matches.iter().flatten().min().copied();
    images
        .iter()
        .zip(matches)
        .filter(|(_, match_kind)| match_kind.is_some() && *match_kind == best)
        .map(|(image, _)| image)
        .collect()
}

fn match_kind(tag: &str, name: &str) -> Option<MatchKind> {
    let whole = |name: &str| Reference::parse(name).ok().map(|reference| reference.to_string());
    if tag == name || whole(tag).is_some_and(|tag| Some(tag) == whole(name)) {
        return Some(MatchKind::Exact);
    }
    let start = name.strip_suffix(tag).filter(|_| !tag.is_empty())?;
    start.ends_with([':', '/']).then_some(MatchKind::Suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_match_counts() {
        let names = [
            "docker.io/library/one:latest",
            "docker.io/library/two:latest",
            "docker.io/team/one:latest",
            "10",
            "a/b:2",
        ];
        let matching = |tag| {
            matching(tag, &names, |name| vec![(*name).to_owned()]).into_iter().copied().collect::<Vec<_>>()
        };
        let all = &names[..3];
        assert_eq!(matching("latest"), all);
        assert_eq!(matching("one:latest"), [names[0]]);
        assert_eq!(matching("one"), [names[0]]);
        assert_eq!(matching("library/two:latest"), [names[1]]);
        assert_eq!(matching("docker.io/two"), [names[1]]);
        assert_eq!(matching("team/one"), [names[2]]);
        assert_eq!(matching("10"), ["10"]);
        assert_eq!(matching("2"), ["a/b:2"]);
        assert_eq!(matching("b:2"), ["a/b:2"]);
        for tag in ["", "three", "ne:latest", "1", "0", "wo"] {
            assert_eq!(matching(tag), [""; 0], "{tag}");
        }
    }
}
