//! Whether a kernel got the configuration that was asked for, and if not, why not.
//!
//! `make olddefconfig` drops a setting whose dependencies do not hold without a word. This turns
//! that silence into a sentence for each lost setting.

use std::fmt;

use crate::compose::{Asked, Composed};
use crate::config::KernelConfig;
use crate::kconfig::{Definition, Kconfig, Kind, Prompt, Selection, Symbol, Truth, truth_of};
use crate::nearest::nearest;
use crate::needs::{Blame, Need, NeedList, listed, prefixed, selectors, state};
use crate::value::Value;

/// A setting that the kernel did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// The value asked for.
    pub asked: Value,
    /// The value it has.
    pub got: Value,
    /// The fragment's file.
    pub file: String,
    /// The line in it.
    pub line: usize,
    /// Why the kernel did not take it.
    pub reason: Reason,
}

/// Why a setting was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// This kernel has no such symbol.
    NoSuchSymbol {
        /// The symbol that was probably meant.
        nearest: Option<String>,
    },
    /// The value is of another type than the symbol.
    WrongType {
        /// The symbol's type.
        kind: Kind,
    },
    /// Nobody can set the symbol; other symbols do.
    NoPrompt {
        /// The symbols that select it.
        selected_by: Vec<String>,
    },
    /// What it depends on does not hold.
    Needs(Vec<Need>),
    /// It is forced on.
    ForcedOn {
        /// By these symbols, which are set and select it.
        by: Vec<Culprit>,
    },
    /// It can only be set when something else holds; until then its default counts.
    PromptHidden(Vec<Need>),
    /// It is a member of a choice, and another member was taken.
    OtherChoice {
        /// The choice's question.
        choice: String,
        /// The member that was taken.
        taken: Culprit,
    },
    /// It is the member that its choice took, and one member must be on.
    OnlyChoice {
        /// The choice's question.
        choice: String,
    },
    /// The number is outside its bounds.
    OutOfRange {
        /// The lower bound.
        low: Value,
        /// The upper bound.
        high: Value,
    },
    /// Nothing certain speaks against it, but it hangs on tests that are not run here.
    Undetermined(Vec<Need>),
    /// Nothing speaks against it.
    NotFound,
}

/// A symbol that stands in the way, and who asked for that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Culprit {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// Where a fragment asks for it, as `file:line`.
    pub asked_at: Option<String>,
}

/// Compares what was asked for with the `.config` that `make olddefconfig` wrote.
///
/// A symbol that does not exist is an error even where `n` was asked for: it may be a misspelt
/// name, and then the wrong thing stayed on.
///
/// # Errors
///
/// Every setting that the result does not have, sorted by symbol.
pub fn check(asked: &Composed, result: &KernelConfig, kconfig: &Kconfig) -> Result<(), Vec<Unmet>> {
    let check = Check { asked, result, kconfig };
    let unmet: Vec<Unmet> = asked.iter().filter_map(|(symbol, asked)| check.setting(symbol, asked)).collect();
    if unmet.is_empty() { Ok(()) } else { Err(unmet) }
}

struct Check<'a> {
    asked: &'a Composed,
    result: &'a KernelConfig,
    kconfig: &'a Kconfig,
}

impl Check<'_> {
    fn setting(&self, name: &str, asked: &Asked) -> Option<Unmet> {
        let got = self.result.value(name);
        let reason = match self.kconfig.symbol(name) {
            None => self.no_such_symbol(name),
            Some(_) if *got == asked.value => return None,
            Some(symbol) => self.reason(symbol, &asked.value, got),
        };
        Some(Unmet {
            symbol: name.to_owned(),
            asked: asked.value.clone(),
            got: got.clone(),
            file: asked.file.clone(),
            line: asked.line,
            reason,
        })
    }

    fn no_such_symbol(&self, name: &str) -> Reason {
        let names = self.kconfig.symbols().map(|(name, _)| name);
        Reason::NoSuchSymbol { nearest: nearest(name, names).map(str::to_owned) }
    }

    /// Why a symbol has another value than the one asked for. The first reason that applies is
    /// the one to act on.
    fn reason(&self, symbol: &Symbol, asked: &Value, got: &Value) -> Reason {
        let kind = symbol.kind().unwrap_or(Kind::Bool);
        if !fits(asked, kind) {
            return Reason::WrongType { kind };
        }
        if !asked.is_set() {
            let by = self.active(&symbol.selected_by);
            if !by.is_empty() {
                return Reason::ForcedOn { by };
            }
        }
        let Some((definition, needs)) = self.nearest_prompt(symbol, asked, kind) else {
            return Reason::NoPrompt { selected_by: selectors(symbol) };
        };
        let (certain, open): (Vec<Need>, Vec<Need>) = needs.into_iter().partition(Need::is_certain);
        if !certain.is_empty() {
            // A symbol that is on in spite of that has its value from a default or a select. One
            // that is m has not enough for the y that was asked for.
            let has_default = got.is_set() && *got != Value::Module;
            let reason = if has_default { Reason::PromptHidden } else { Reason::Needs };
            return reason(certain);
        }
        self.choice(definition, asked)
            .or_else(|| self.range(definition, asked))
            .unwrap_or(if open.is_empty() { Reason::NotFound } else { Reason::Undetermined(open) })
    }

    /// The definition whose prompt needs the least to appear, and what it needs; `None` if no
    /// definition has a prompt.
    fn nearest_prompt<'s>(
        &self,
        symbol: &'s Symbol,
        asked: &Value,
        kind: Kind,
    ) -> Option<(&'s Definition, Vec<Need>)> {
        let level = match (kind, asked) {
            (Kind::Tristate, Value::Yes) => Truth::Yes,
            _ => Truth::Module,
        };
        let (config, kconfig, asked) = (self.result, self.kconfig, Some(self.asked));
        let blame = Blame { config, kconfig, asked, level };
        let needs = |definition: &Definition, prompt: &Prompt| {
            blame.conditions(definition.depends.iter().chain(&prompt.when).map(AsRef::as_ref))
        };
        symbol
            .prompts()
            .map(|(definition, prompt)| (definition, needs(definition, prompt)))
            .min_by_key(|(_, needs)| needs.iter().filter(|need| need.is_certain()).count())
    }

    /// The selections that are in force.
    fn active(&self, selections: &[Selection]) -> Vec<Culprit> {
        let mut active: Vec<Culprit> = Vec::new();
        for selection in selections.iter().filter(|s| is_active(s, self.result)) {
            let culprit = self.culprit(&selection.by);
            // One symbol may select another on several conditions.
            if !active.contains(&culprit) {
                active.push(culprit);
            }
        }
        active
    }

    fn choice(&self, definition: &Definition, asked: &Value) -> Option<Reason> {
        let choice = self.kconfig.choice(definition.choice?)?;
        let prompt = choice.prompt.clone();
        if !asked.is_set() {
            return Some(Reason::OnlyChoice { choice: prompt });
        }
        let taken = choice.members.iter().find(|member| self.result.value(member).is_set())?;
        Some(Reason::OtherChoice { choice: prompt, taken: self.culprit(taken) })
    }

    /// Whether a number is outside the first bounds that apply.
    fn range(&self, definition: &Definition, asked: &Value) -> Option<Reason> {
        let range = definition
            .ranges
            .iter()
            .find(|range| range.when.as_ref().is_none_or(|when| when.truth(self.result) != Truth::No))?;
        let (low, high) = &range.what;
        let (low, high) = (low.number(self.result)?, high.number(self.result)?);
        let (number, low_value, high_value) = match asked {
            Value::Number(n) => {
                let bound = |bound| i64::try_from(bound).ok().map(Value::Number);
                (i128::from(*n), bound(low)?, bound(high)?)
            }
            Value::Hex(n) => {
                let bound = |bound| u64::try_from(bound).ok().map(Value::Hex);
                (i128::from(*n), bound(low)?, bound(high)?)
            }
            _ => return None,
        };
        let outside = !(low..=high).contains(&number);
        outside.then_some(Reason::OutOfRange { low: low_value, high: high_value })
    }

    fn culprit(&self, symbol: &str) -> Culprit {
        let asked_at = self.asked.asked(symbol).filter(|asked| asked.value.is_set()).map(Asked::place);
        Culprit { symbol: symbol.to_owned(), asked_at }
    }
}

/// Whether a symbol that selects another is set and its conditions may hold.
pub(crate) fn is_active(selection: &Selection, config: &KernelConfig) -> bool {
    truth_of(config.value(&selection.by)) >= Truth::Module
        && selection.when.iter().all(|condition| condition.expr.truth(config) != Truth::No)
}

/// Whether a symbol of this type can have this value.
fn fits(value: &Value, kind: Kind) -> bool {
    match kind {
        Kind::Bool => matches!(value, Value::Yes | Value::No),
        Kind::Tristate => matches!(value, Value::Yes | Value::Module | Value::No),
        Kind::Int => matches!(value, Value::Number(_)),
        Kind::Hex => matches!(value, Value::Hex(_)),
        Kind::Text => matches!(value, Value::Text(_)),
    }
}

/// Two lines: where and what, then why.
impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { symbol, asked, got, file, line, .. } = self;
        write!(f, "{file}:{line}: CONFIG_{symbol}={asked} was not taken; it {}\n    ", state(got))?;
        self.fmt_reason(f)
    }
}

impl Unmet {
    fn fmt_reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::NoSuchSymbol { nearest: None } => f.write_str("this kernel has no such symbol"),
            Reason::NoSuchSymbol { nearest: Some(nearest) } => {
                write!(f, "this kernel has no such symbol; is CONFIG_{nearest} meant?")
            }
            Reason::WrongType { kind } => write!(f, "it is {}", described(*kind)),
            Reason::NoPrompt { selected_by } => fmt_no_prompt(f, selected_by),
            Reason::Needs(needs) => write!(f, "it needs {}", NeedList(needs)),
            Reason::ForcedOn { by } => {
                let texts: Vec<String> = by.iter().map(ToString::to_string).collect();
                let verb = if by.len() == 1 { "selects" } else { "select" };
                write!(f, "{} {verb} it", listed(&texts, "and"))
            }
            Reason::PromptHidden(needs) => {
                write!(f, "it keeps its default; setting it needs {}", NeedList(needs))
            }
            Reason::OtherChoice { choice, taken } => {
                write!(f, "the choice {choice:?} took {taken}")?;
                match taken.asked_at {
                    Some(_) => write!(f, "; if that is meant, ask for CONFIG_{}=n there", self.symbol),
                    None => Ok(()),
                }
            }
            Reason::OnlyChoice { choice } => {
                write!(f, "one of the choice {choice:?} must be y; ask for another one")
            }
            Reason::OutOfRange { low, high } => write!(f, "it must be from {low} to {high}"),
            Reason::Undetermined(needs) => {
                write!(f, "it hangs on {}", NeedList(needs))
            }
            Reason::NotFound => {
                f.write_str("nothing speaks against it; was the text appended before make olddefconfig?")
            }
        }
    }
}

fn fmt_no_prompt(f: &mut fmt::Formatter<'_>, selected_by: &[String]) -> fmt::Result {
    f.write_str("it cannot be set directly (it has no prompt); ")?;
    if selected_by.is_empty() {
        return f.write_str("its default decides");
    }
    write!(f, "what sets it is {}", listed(&prefixed(selected_by), "or"))
}

fn described(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool | Kind::Tristate => "a switch: y or n",
        Kind::Int => "a decimal number",
        Kind::Hex => "a hexadecimal number: 0x...",
        Kind::Text => "a string: \"...\"",
    }
}

impl fmt::Display for Culprit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CONFIG_{}", self.symbol)?;
        match &self.asked_at {
            Some(at) => write!(f, " (asked for at {at})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
