//! Putting fragments together into one request.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use thiserror::Error;

use crate::fragment::{Fragment, Origin, Setting};
use crate::value::{Value, bare, config_line};

/// Why fragments cannot be composed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ComposeError {
    /// Two shipped fragments want different values.
    #[error(
        "CONFIG_{symbol}: {} asks for {}, {} for {}",
        first.place(), first.value, second.place(), second.value
    )]
    Conflict {
        /// The symbol they disagree about.
        symbol: String,
        /// What the earlier fragment asks for.
        first: Box<Asked>,
        /// What the later fragment asks for.
        second: Box<Asked>,
    },
}

/// What is asked of one symbol, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The value asked for.
    pub value: Value,
    /// Why, if the fragment says.
    pub reason: Option<String>,
    /// The fragment's file.
    pub file: String,
    /// The line in it.
    pub line: usize,
    /// Who wrote the fragment.
    pub origin: Origin,
}

impl Asked {
    /// Where it is asked for, as `file:line`.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

/// All that a list of fragments asks for: one value per symbol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Composed {
    settings: BTreeMap<String, Asked>,
}

impl Composed {
    /// What is asked of a symbol (with or without `CONFIG_`).
    #[must_use]
    pub fn asked(&self, symbol: &str) -> Option<&Asked> {
        self.settings.get(bare(symbol))
    }

    /// All settings, sorted by symbol.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Asked)> {
        self.settings.iter().map(|(symbol, asked)| (symbol.as_str(), asked))
    }

    /// How many symbols have a setting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.settings.len()
    }

    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty()
    }

    /// The lines to append to the `.config` that `make tinyconfig` wrote, before
    /// `make olddefconfig`.
    ///
    /// The text depends on the settings alone, not on comments or the order of lines, so that its
    /// digest can key a kernel build. A user's settings come last, because the last member of a
    /// choice that is set to `y` is the one that the kernel takes.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for origin in Origin::ALL {
            for (symbol, asked) in self.iter().filter(|(_, asked)| asked.origin == origin) {
                text.push_str(&config_line(symbol, &asked.value));
                text.push('\n');
            }
        }
        text
    }

    fn add(&mut self, fragment: &Fragment, setting: &Setting) -> Result<(), ComposeError> {
        let asked = Asked {
            value: setting.value.clone(),
            reason: setting.reason.clone(),
            file: fragment.file(),
            line: setting.line,
            origin: fragment.origin,
        };
        let mut entry = match self.settings.entry(setting.symbol.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(asked);
                return Ok(());
            }
            Entry::Occupied(entry) => entry,
        };
        let earlier = entry.get();
        if earlier.value == asked.value {
            // The first fragment to ask keeps the credit: its reason is the more basic one.
            return Ok(());
        }
        if asked.origin > earlier.origin || asked.origin == Origin::User {
            entry.insert(asked);
            return Ok(());
        }
        Err(ComposeError::Conflict {
            symbol: setting.symbol.clone(),
            first: Box::new(earlier.clone()),
            second: Box::new(asked),
        })
    }
}

/// Merges fragments.
///
/// Default fragments may ask for the same value, but not for different ones, and so may optional
/// ones, which override the default. A user's fragment overrides every shipped one wherever it
/// stands in the list, and the last of several users' fragments wins.
///
/// # Errors
///
/// Two default fragments that disagree, or two optional ones.
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
    fn equal_requests_are_merged_and_the_first_keeps_the_credit() {
        let net = fragment("net", Origin::Default, "CONFIG_NET=y # Sockets.\n");
        let vsock = fragment("vsock", Origin::Default, "CONFIG_NET=y # A socket family.\n");
        let composed = compose(&[net, vsock]).unwrap();
        assert_eq!(composed.len(), 1);
        assert_eq!(composed.asked("CONFIG_NET").unwrap().file, "net.config");
    }

    #[test]
    fn shipped_fragments_may_not_disagree() {
        let one = fragment("one", Origin::Default, "CONFIG_A=y # a\nCONFIG_N=16 # n\n");
        let two = fragment("two", Origin::Default, "# Two.\nCONFIG_N=8 # fewer\n");
        assert_eq!(
            compose(&[one, two]).unwrap_err().to_string(),
            "CONFIG_N: one.config:2 asks for 16, two.config:2 for 8"
        );
    }

    #[test]
    fn optional_fragments_override_the_default_but_not_each_other() {
        let slim = fragment("slim", Origin::Optional, "CONFIG_A=n # a\n");
        let base = fragment("base", Origin::Default, "CONFIG_A=y # a\n");
        let rich = fragment("rich", Origin::Optional, "CONFIG_A=y # a\n");
        let composed = compose(&[slim.clone(), base]).unwrap();
        assert_eq!(composed.asked("A").unwrap().file, "slim.config");
        assert_eq!(
            compose(&[slim, rich]).unwrap_err().to_string(),
            "CONFIG_A: slim.config:1 asks for n, rich.config:1 for y"
        );
    }

    #[test]
    fn users_win_and_the_last_user_wins() {
        let first = fragment("first.config", Origin::User, "CONFIG_A=n\nCONFIG_B=1\n");
        let base = fragment("base", Origin::Default, "CONFIG_A=y # a\nCONFIG_C=y # c\n");
        let last = fragment("last.config", Origin::User, "CONFIG_B=2\n");
        let composed = compose(&[first, base, last]).unwrap();
        let asked = composed.asked("A").unwrap();
        assert_eq!((&asked.value, asked.file.as_str()), (&Value::No, "first.config"));
        assert_eq!(composed.asked("B").unwrap().file, "last.config");
        // Shipped settings first, a user's last.
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
    fn nothing_composes_to_nothing() {
        let composed = compose(&[]).unwrap();
        assert!(composed.is_empty());
        assert_eq!(composed.text(), "");
    }
}
