//! The profile as a self-contained HTML page.
//!
//! Script and style are fixed. All text that a guest or a user chose is in one JSON document, which the script displays
//! as text and never as markup.

use super::record::Profile;
use super::{against, text};
use crate::output::COLOURS;
use anyhow::Result;
use serde_json::json;

/// The page with a placeholder for the data.
const PAGE: &str = include_str!("page.html");
const PLACEHOLDER: &str = "{data}";

/// The page of a profile, with the changes since an earlier one.
pub(super) fn html(profile: &Profile, earlier: Option<&Profile>) -> Result<String> {
    let differences: Option<Vec<_>> = earlier.map(|earlier| {
        against::differences(earlier, profile)
            .into_iter()
            .map(|change| json!([change.lane.title(), change.name, change.old, change.new]))
            .collect()
    });
    let data = json!({
        "profile": profile,
        "recording": text::perturbation(profile),
        "differences": differences,
        "colours": COLOURS,
    });
    Ok(PAGE.replacen(PLACEHOLDER, &embedded(&serde_json::to_string(&data)?), 1))
}

/// Escapes JSON for a script element, so that no text in it ends the element or begins a comment.
fn embedded(json: &str) -> String {
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::profile;
    use super::*;

    #[test]
    fn text_of_a_guest_never_becomes_markup() {
        let page = html(&profile(), Some(&profile())).unwrap();
        assert!(!page.contains("<img"), "a name became markup");
        let count = |text: &str| page.matches(text).count();
        assert_eq!(count("</script>"), PAGE.matches("</script>").count());
        let start = page.find("type=\"application/json\">").unwrap() + "type=\"application/json\">".len();
        let data = &page[start..start + page[start..].find("</script>").unwrap()];
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["profile"], serde_json::to_value(profile()).unwrap());
    }

    #[test]
    fn the_page_has_no_external_references() {
        for word in ["http:", "https:", "src=", "@import", "url(", "innerHTML", "eval("] {
            assert!(!PAGE.contains(word), "the page has {word}");
        }
        assert_eq!(PAGE.matches(PLACEHOLDER).count(), 1);
    }
}
