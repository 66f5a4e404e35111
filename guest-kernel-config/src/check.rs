//! Checks whether a kernel has the requested configuration, and finds the reasons of differences.
//!
//! `make olddefconfig` silently drops a setting with unmet dependencies. This module reports each dropped setting with
//! its reason.

use std::fmt;

use crate::compose::{Composed, Request};
use crate::config::KernelConfig;
use crate::kconfig::{Definition, Kconfig, Kind, Prompt, Selection, Symbol, Truth, truth_of};
use crate::nearest::nearest;
use crate::needs::{Diagnosis, Need, NeedList, listed, prefixed, selectors, state};
use crate::value::Value;

/// A setting that the kernel configuration does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// The requested value.
    pub requested: Value,
    /// The actual value.
    pub actual: Value,
    /// The fragment's file.
    pub file: String,
    /// The line in the file.
    pub line: usize,
    /// The reason.
    pub reason: Reason,
}

/// Why a setting had no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// This kernel has no such symbol.
    NoSuchSymbol {
        /// A symbol with a similar name.
        nearest: Option<String>,
    },
    /// The type of the value is not that of the symbol.
    WrongType {
        /// The symbol's type.
        kind: Kind,
    },
    /// The symbol has no prompt; only other symbols can set it.
    NoPrompt {
        /// The symbols that select it.
        selected_by: Vec<String>,
    },
    /// Its dependencies are not met.
    Needs(Vec<Need>),
    /// Another symbol selects it.
    ForcedOn {
        /// The symbols that are set and select it.
        by: Vec<Cause>,
    },
    /// The condition of its prompt is not met, so that it keeps its default.
    PromptHidden(Vec<Need>),
    /// It is a member of a choice, and another member is selected.
    OtherChoice {
        /// The prompt of the choice.
        choice: String,
        /// The selected member.
        selected: Cause,
    },
    /// It is the selected member of a choice, and one member must be selected.
    OnlyChoice {
        /// The prompt of the choice.
        choice: String,
    },
    /// The number is out of range.
    OutOfRange {
        /// The lower bound.
        low: Value,
        /// The upper bound.
        high: Value,
    },
    /// It depends on compiler tests, which are not run here; everything else is met.
    Undetermined(Vec<Need>),
    /// No reason was found.
    NotFound,
}

/// A symbol that causes the difference, and the request for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// Location of the request for it, as `file:line`.
    pub requested_at: Option<String>,
}

/// Compares the requests with the `.config` that `make olddefconfig` wrote.
///
/// A request for an unknown symbol is an error even if it requests `n`: the name may be misspelt, and the intended
/// symbol is still set.
///
/// # Errors
///
/// Every request that the result does not meet, sorted by symbol.
pub fn check(requests: &Composed, result: &KernelConfig, kconfig: &Kconfig) -> Result<(), Vec<Unmet>> {
    let check = Check { requests, result, kconfig };
    let unmet: Vec<Unmet> =
        requests.iter().filter_map(|(symbol, request)| check.setting(symbol, request)).collect();
    if unmet.is_empty() { Ok(()) } else { Err(unmet) }
}

struct Check<'a> {
    requests: &'a Composed,
    result: &'a KernelConfig,
    kconfig: &'a Kconfig,
}

impl Check<'_> {
    fn setting(&self, name: &str, request: &Request) -> Option<Unmet> {
        let actual = self.result.value(name);
        let reason = match self.kconfig.symbol(name) {
            None => self.no_such_symbol(name),
            Some(_) if *actual == request.value => return None,
            Some(symbol) => self.reason(symbol, &request.value, actual),
        };
        Some(Unmet {
            symbol: name.to_owned(),
            requested: request.value.clone(),
            actual: actual.clone(),
            file: request.file.clone(),
            line: request.line,
            reason,
        })
    }

    fn no_such_symbol(&self, name: &str) -> Reason {
        let names = self.kconfig.symbols().map(|(name, _)| name);
        Reason::NoSuchSymbol { nearest: nearest(name, names).map(str::to_owned) }
    }

    /// Finds the reason why a symbol does not have the requested value. The order of the checks is that of relevance.
    fn reason(&self, symbol: &Symbol, requested: &Value, actual: &Value) -> Reason {
        let kind = symbol.kind().unwrap_or(Kind::Bool);
        if !fits(requested, kind) {
            return Reason::WrongType { kind };
        }
        if !requested.is_set() {
            let by = self.active(&symbol.selected_by);
            if !by.is_empty() {
                return Reason::ForcedOn { by };
            }
        }
        let Some((definition, needs)) = self.nearest_prompt(symbol, requested, kind) else {
            return Reason::NoPrompt { selected_by: selectors(symbol) };
        };
        let (certain, open): (Vec<Need>, Vec<Need>) = needs.into_iter().partition(Need::is_certain);
        if !certain.is_empty() {
            // A symbol that is set nevertheless has its value from a default or a select. If it is m, its
            // dependencies do not suffice for the requested y.
            let has_default = actual.is_set() && *actual != Value::Module;
            let reason = if has_default { Reason::PromptHidden } else { Reason::Needs };
            return reason(certain);
        }
        self.choice(definition, requested)
            .or_else(|| self.range(definition, requested))
            .unwrap_or(if open.is_empty() { Reason::NotFound } else { Reason::Undetermined(open) })
    }

    /// The definition with a prompt that has the fewest unmet conditions, and these conditions. Returns `None` if no
    /// definition has a prompt.
    fn nearest_prompt<'s>(
        &self,
        symbol: &'s Symbol,
        requested: &Value,
        kind: Kind,
    ) -> Option<(&'s Definition, Vec<Need>)> {
        let level = match (kind, requested) {
            (Kind::Tristate, Value::Yes) => Truth::Yes,
            _ => Truth::Module,
        };
        let (config, kconfig, requests) = (self.result, self.kconfig, Some(self.requests));
        let diagnosis = Diagnosis { config, kconfig, requests, level };
        let needs = |definition: &Definition, prompt: &Prompt| {
            diagnosis.conditions(definition.depends.iter().chain(&prompt.when).map(AsRef::as_ref))
        };
        symbol
            .prompts()
            .map(|(definition, prompt)| (definition, needs(definition, prompt)))
            .min_by_key(|(_, needs)| needs.iter().filter(|need| need.is_certain()).count())
    }

    /// The causes of active selections.
    fn active(&self, selections: &[Selection]) -> Vec<Cause> {
        let mut active: Vec<Cause> = Vec::new();
        for selection in selections.iter().filter(|s| is_active(s, self.result)) {
            let cause = self.cause(&selection.by);
            // One symbol may select another on several conditions.
            if !active.contains(&cause) {
                active.push(cause);
            }
        }
        active
    }

    fn choice(&self, definition: &Definition, requested: &Value) -> Option<Reason> {
        let choice = self.kconfig.choice(definition.choice?)?;
        let prompt = choice.prompt.clone();
        if !requested.is_set() {
            return Some(Reason::OnlyChoice { choice: prompt });
        }
        let selected = choice.members.iter().find(|member| self.result.value(member).is_set())?;
        Some(Reason::OtherChoice { choice: prompt, selected: self.cause(selected) })
    }

    /// Checks a number against the first range that applies.
    fn range(&self, definition: &Definition, requested: &Value) -> Option<Reason> {
        let range = definition
            .ranges
            .iter()
            .find(|range| range.when.as_ref().is_none_or(|when| when.truth(self.result) != Truth::No))?;
        let (low, high) = &range.value;
        let (low, high) = (low.number(self.result)?, high.number(self.result)?);
        let (number, low_value, high_value) = match requested {
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

    fn cause(&self, symbol: &str) -> Cause {
        let requested_at =
            self.requests.request(symbol).filter(|request| request.value.is_set()).map(Request::location);
        Cause { symbol: symbol.to_owned(), requested_at }
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

/// Formats two lines: location and setting, then the reason.
impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { symbol, requested, actual, file, line, .. } = self;
        write!(
            f,
            "{file}:{line}: CONFIG_{symbol}={requested} has no effect: the symbol {}\n    ",
            state(actual)
        )?;
        self.fmt_reason(f)
    }
}

impl Unmet {
    fn fmt_reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::NoSuchSymbol { nearest: None } => f.write_str("this kernel has no such symbol"),
            Reason::NoSuchSymbol { nearest: Some(nearest) } => {
                write!(f, "this kernel has no such symbol; did you mean CONFIG_{nearest}?")
            }
            Reason::WrongType { kind } => write!(f, "the symbol is {}", described(*kind)),
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
            Reason::OtherChoice { choice, selected } => {
                write!(f, "the choice {choice:?} is set to {selected}")?;
                match selected.requested_at {
                    Some(_) => write!(f, "; if that is intended, request CONFIG_{}=n", self.symbol),
                    None => Ok(()),
                }
            }
            Reason::OnlyChoice { choice } => {
                write!(f, "one member of the choice {choice:?} must be y; request another member")
            }
            Reason::OutOfRange { low, high } => write!(f, "it must be from {low} to {high}"),
            Reason::Undetermined(needs) => {
                write!(f, "it depends on {}", NeedList(needs))
            }
            Reason::NotFound => {
                f.write_str("no reason found; was the text appended before make olddefconfig?")
            }
        }
    }
}

fn fmt_no_prompt(f: &mut fmt::Formatter<'_>, selected_by: &[String]) -> fmt::Result {
    f.write_str("it cannot be set directly (it has no prompt); ")?;
    if selected_by.is_empty() {
        return f.write_str("its default decides");
    }
    write!(f, "it is set by {}", listed(&prefixed(selected_by), "or"))
}

fn described(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool | Kind::Tristate => "a bool: y or n",
        Kind::Int => "a decimal number",
        Kind::Hex => "a hexadecimal number: 0x...",
        Kind::Text => "a string: \"...\"",
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CONFIG_{}", self.symbol)?;
        match &self.requested_at {
            Some(at) => write!(f, " (requested at {at})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
