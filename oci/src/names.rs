//! Names of images in a layout or an archive, and the words by which they are asked for.

use crate::reference::Reference;

/// How well a word fits the names of an image: the less, the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// It is one of them, or another way to write it.
    Whole,
    /// It is the end of one of them.
    End,
}

/// The images that a word means: those whose names it fits best.
pub(crate) fn meant<'a, T>(word: &str, images: &'a [T], names: impl Fn(&T) -> Vec<String>) -> Vec<&'a T> {
    let fits: Vec<_> =
        images.iter().map(|image| names(image).iter().filter_map(|name| fit(word, name)).min()).collect();
    let best = fits.iter().flatten().min().copied();
    images.iter().zip(fits).filter(|(_, fit)| fit.is_some() && *fit == best).map(|(image, _)| image).collect()
}

fn fit(word: &str, name: &str) -> Option<Fit> {
    let whole = |name: &str| Reference::parse(name).ok().map(|reference| reference.to_string());
    if word == name || whole(word).is_some_and(|word| Some(word) == whole(name)) {
        return Some(Fit::Whole);
    }
    let start = name.strip_suffix(word).filter(|_| !word.is_empty())?;
    start.ends_with([':', '/']).then_some(Fit::End)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_means_the_images_whose_names_it_fits_best() {
        let names = [
            "docker.io/library/one:latest",
            "docker.io/library/two:latest",
            "docker.io/team/one:latest",
            "10",
            "a/b:2",
        ];
        let meant = |word| {
            meant(word, &names, |name| vec![(*name).to_owned()]).into_iter().copied().collect::<Vec<_>>()
        };
        let all = &names[..3];
        assert_eq!(meant("latest"), all);
        assert_eq!(meant("one:latest"), [names[0]]);
        assert_eq!(meant("one"), [names[0]]);
        assert_eq!(meant("library/two:latest"), [names[1]]);
        assert_eq!(meant("docker.io/two"), [names[1]]);
        assert_eq!(meant("team/one"), [names[2]]);
        assert_eq!(meant("10"), ["10"]);
        assert_eq!(meant("2"), ["a/b:2"]);
        assert_eq!(meant("b:2"), ["a/b:2"]);
        for word in ["", "three", "ne:latest", "1", "0", "wo"] {
            assert_eq!(meant(word), [""; 0], "{word}");
        }
    }
}
