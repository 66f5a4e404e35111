//! Merges fragments into one set of requests.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use thiserror::Error;

use crate::fragment::{Fragment, Origin, Setting};
use crate::value::{Value, bare, config_line};

/// Why fragments cannot be composed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ComposeError {
    /// Two shipped fragments request different values.
    #[error(
        "CONFIG_{symbol}: {} requests {}, {} requests {}",
        first.location(), first.value, second.location(), second.value
    )]
    Conflict {
        /// The symbol.
        symbol: String,
        /// The request of the earlier fragment.
        first: Box<Request>,
        /// The request of the later fragment.
        second: Box<Request>,
    },
}

/// The requested value of a symbol, and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The requested value.
    pub value: Value,
    /// The reason, if the fragment has one.
    pub reason: Option<String>,
    /// The fragment's file.
    pub file: String,
    /// The line in the file.
    pub line: usize,
    /// Origin of the fragment.
    pub origin: Origin,
}

impl Request {
    /// Location of the request, as `file:line`.
    #[must_use]
    pub fn location(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

/// The requests of a list of fragments: one value per symbol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Composed {
    settings: BTreeMap<String, Request>,
}

impl Composed {
    /// The request for a symbol (with or without `CONFIG_`).
    #[must_use]
    pub fn request(&self, symbol: &str) -> Option<&Request> {
        self.settings.get(bare(symbol))
    }

    /// All requests, sorted by symbol.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Request)> {
        self.settings.iter().map(|(symbol, request)| (symbol.as_str(), request))
    }

    /// Number of symbols with a request.
    #[must_use]
    pub fn len(&self) -> usize {
        self.settings.len()
    }

    /// Whether there are no requests.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty()
    }

    /// The lines to append to the `.config` that `make tinyconfig` wrote, before
    /// `make olddefconfig`.
    ///
    /// The text depends only on the settings and not on comments or the order of lines, so that its digest can identify
    /// a kernel build. A user's settings come last, because the kernel takes the last of several members of a
    /// choice that are set to `y`.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for origin in Origin::ALL {
            for (symbol, request) in self.iter().filter(|(_, request)| request.origin == origin) {
                text.push_str(&config_line(symbol, &request.value));
                text.push('\n');
            }
        }
        text
    }

    fn add(&mut self, fragment: &Fragment, setting: &Setting) -> Result<(), ComposeError> {
        let request = Request {
            value: setting.value.clone(),
            reason: setting.reason.clone(),
            file: fragment.file(),
            line: setting.line,
            origin: fragment.origin,
        };
        let mut entry = match self.settings.entry(setting.symbol.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(request);
                return Ok(());
            }
            Entry::Occupied(entry) => entry,
        };
        let earlier = entry.get();
        if earlier.value == request.value {
            // The first request is kept, because its reason is the more basic one.
            return Ok(());
        }
        if request.origin > earlier.origin || request.origin == Origin::User {
            entry.insert(request);
            return Ok(());
        }
        Err(ComposeError::Conflict {
            symbol: setting.symbol.clone(),
            first: Box::new(earlier.clone()),
            second: Box::new(request),
        })
    }
}

/// Merges fragments.
///
/// Default fragments may request the same value of a symbol, but not different ones. The same holds for optional
/// fragments, which override the default ones. A user's fragment overrides every shipped one, at any position in the
/// list. Of several fragments of a user, the last one wins.
///
/// # Errors
///
/// When two default fragments, or two optional ones, request different values.
pub fn compose(fragments: &[Fragment]) -> Result<Composed, ComposeError> {
    let mut composed = Composed::default();
    for origin in Origin::ALL {
        for fragment in fragments.iter().filter(|fragment| fragment.origin == origin) {
            for setting in &fragment.symbols {
                composed.add(fragment, setting)?;
            }
        }
    }
    Ok(composed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(name: &str, origin: Origin, text: &str) -> Fragment {
        Fragment::parse(name, text.as_bytes(), origin).unwrap()
    }

    #[test]
    fn equal_requests_are_merged_and_the_first_one_is_kept() {
        let net = fragment("net", Origin::Default, "CONFIG_NET=y # Sockets.\n");
        let vsock = fragment("vsock", Origin::Default, "CONFIG_NET=y # A socket family.\n");
        let composed = compose(&[net, vsock]).unwrap();
        assert_eq!(composed.len(), 1);
        assert_eq!(composed.request("CONFIG_NET").unwrap().file, "net.config");
    }

    #[test]
    fn shipped_fragments_must_not_conflict() {
        let one = fragment("one", Origin::Default, "CONFIG_A=y # a\nCONFIG_N=16 # n\n");
        let two = fragment("two", Origin::Default, "# Two.\nCONFIG_N=8 # fewer\n");
        assert_eq!(
            compose(&[one, two]).unwrap_err().to_string(),
            "CONFIG_N: one.config:2 requests 16, two.config:2 requests 8"
        );
    }

    #[test]
    fn optional_fragments_override_the_default_but_not_each_other() {
        let slim = fragment("slim", Origin::Optional, "CONFIG_A=n # a\n");
        let base = fragment("base", Origin::Default, "CONFIG_A=y # a\n");
        let rich = fragment("rich", Origin::Optional, "CONFIG_A=y # a\n");
        let composed = compose(&[slim.clone(), base]).unwrap();
        assert_eq!(composed.request("A").unwrap().file, "slim.config");
        assert_eq!(
            compose(&[slim, rich]).unwrap_err().to_string(),
            "CONFIG_A: slim.config:1 requests n, rich.config:1 requests y"
        );
    }

    #[test]
    fn user_fragments_override_and_the_last_one_wins() {
        let first = fragment("first.config", Origin::User, "CONFIG_A=n\nCONFIG_B=1\n");
        let base = fragment("base", Origin::Default, "CONFIG_A=y # a\nCONFIG_C=y # c\n");
        let last = fragment("last.config", Origin::User, "CONFIG_B=2\n");
        let composed = compose(&[first, base, last]).unwrap();
        let request = composed.request("A").unwrap();
        assert_eq!((&request.value, request.file.as_str()), (&Value::No, "first.config"));
        assert_eq!(composed.request("B").unwrap().file, "last.config");
        // Shipped settings come first, a user's last.
        assert_eq!(composed.text(), "CONFIG_C=y\n# CONFIG_A is not set\nCONFIG_B=2\n");
    }

    #[test]
    fn the_text_does_not_depend_on_comments_or_order() {
        let one = fragment("x", Origin::Default, "CONFIG_B=y # b\nCONFIG_A=\"a\\\"\" # a\n");
        let two = fragment("x", Origin::Default, "# X.\nCONFIG_A=\"a\\\"\" # 1\nCONFIG_B=y # 2\n");
        let text = compose(&[one]).unwrap().text();
        assert_eq!(text, "CONFIG_A=\"a\\\"\"\nCONFIG_B=y\n");
        assert_eq!(text, compose(&[two]).unwrap().text());
    }

    #[test]
    fn no_fragments_compose_to_an_empty_text() {
        let composed = compose(&[]).unwrap();
        assert!(composed.is_empty());
        assert_eq!(composed.text(), "");
    }
}
