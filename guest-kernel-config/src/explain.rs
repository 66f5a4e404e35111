//! A description of one symbol.

use std::fmt;

use crate::check::is_active;
use crate::config::KernelConfig;
use crate::fragment::{Fragment, Origin};
use crate::kconfig::{Choice, Condition, Conditional, Definition, Kconfig, Kind, Selection, Symbol, Truth};
use crate::nearest::nearest;
use crate::needs::{Diagnosis, Need, NeedList, listed, state};
use crate::value::bare;

/// Maximum number of lines of a help text.
const MAX_HELP_LINES: usize = 12;

/// Maximum number of active selections that are listed one by one.
const MAX_SELECTIONS: usize = 8;

/// Describes a symbol (with or without `CONFIG_`): its value in a configuration, the fragments that request it with
/// their reasons, its definitions, dependencies and selections, and its help text.
///
/// Without a configuration, the text contains no values.
#[must_use]
pub fn explain(
    symbol: &str,
    kconfig: &Kconfig,
    config: Option<&KernelConfig>,
    fragments: &[Fragment],
) -> String {
    Explanation { name: bare(symbol), kconfig, config, fragments }.to_string()
}

struct Explanation<'a> {
    name: &'a str,
    kconfig: &'a Kconfig,
    config: Option<&'a KernelConfig>,
    fragments: &'a [Fragment],
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(symbol) = self.kconfig.symbol(self.name) else {
            writeln!(f, "CONFIG_{}: this kernel has no such symbol", self.name)?;
            let names = self.kconfig.symbols().map(|(name, _)| name);
            if let Some(near) = nearest(self.name, names) {
                writeln!(f, "  did you mean CONFIG_{near}?")?;
            }
            return self.fmt_requests(f);
        };
        write!(f, "CONFIG_{}", self.name)?;
        match self.config {
            Some(config) => writeln!(f, " {}", state(config.value(self.name)))?,
            None => writeln!(f)?,
        }
        self.fmt_requests(f)?;
        for definition in &symbol.definitions {
            self.fmt_definition(f, definition, symbol.kind())?;
        }
        self.fmt_selections(f, "selected by", &symbol.selected_by)?;
        self.fmt_selections(f, "implied by", &symbol.implied_by)?;
        fmt_help(f, symbol)
    }
}

impl Explanation<'_> {
    fn fmt_requests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut is_requested = false;
        for fragment in self.fragments {
            for setting in fragment.symbols.iter().filter(|s| s.symbol == self.name) {
                is_requested = true;
                let (value, file, line) = (&setting.value, fragment.file(), setting.line);
                let reason = setting.reason.as_deref().unwrap_or("(no reason given)");
                let optional = if is_optional(fragment) { " (an optional fragment)" } else { "" };
                writeln!(f, "  requested: {value} at {file}:{line}{optional}: {reason}")?;
            }
        }
        if is_requested { Ok(()) } else { writeln!(f, "  requested: by no fragment") }
    }

    fn fmt_definition(
        &self,
        f: &mut fmt::Formatter<'_>,
        definition: &Definition,
        kind: Option<Kind>,
    ) -> fmt::Result {
        let kind = definition.kind.or(kind).map_or_else(String::new, |kind| format!(" ({kind})"));
        writeln!(f, "  defined at {}{kind}", definition.at)?;
        match &definition.prompt {
            Some(prompt) => {
                writeln!(f, "    prompt: {:?}", prompt.text)?;
                self.fmt_conditions(f, "only if", prompt.when.iter().map(AsRef::as_ref))?;
            }
            None => writeln!(f, "    no prompt: it cannot be set directly")?,
        }
        self.fmt_conditions(f, "depends on", definition.depends.iter().map(AsRef::as_ref))?;
        self.fmt_needs(f, definition)?;
        for Conditional { value, when } in &definition.defaults {
            write!(f, "    default: {}", value.annotated(self.config))?;
            match when {
                Some(when) => writeln!(f, " if {}", when.annotated(self.config))?,
                None => writeln!(f)?,
            }
        }
        if let Some(choice) = definition.choice.and_then(|index| self.kconfig.choice(index)) {
            self.fmt_choice(f, choice)?;
        }
        Ok(())
    }

    fn fmt_choice(&self, f: &mut fmt::Formatter<'_>, choice: &Choice) -> fmt::Result {
        write!(f, "    member of the choice {:?}: {}", choice.prompt, choice.members.join(", "))?;
        let is_selected = |member: &&String| self.config.is_some_and(|c| c.value(member).is_set());
        match choice.members.iter().find(is_selected) {
            Some(selected) => writeln!(f, "; selected: {selected}"),
            None => writeln!(f),
        }
    }

    fn fmt_conditions<'c>(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        conditions: impl Iterator<Item = &'c Condition>,
    ) -> fmt::Result {
        for Condition { expr, at } in conditions {
            writeln!(f, "    {title}: {} ({at})", expr.annotated(self.config))?;
        }
        Ok(())
    }

    /// Lists the unmet conditions of a definition, as [`crate::check`] does.
    fn fmt_needs(&self, f: &mut fmt::Formatter<'_>, definition: &Definition) -> fmt::Result {
        let Some(config) = self.config else { return Ok(()) };
        let (kconfig, level) = (self.kconfig, Truth::Module);
        let diagnosis = Diagnosis { config, kconfig, requests: None, level };
        let when = definition.prompt.iter().flat_map(|prompt| &prompt.when);
        let conditions = definition.depends.iter().chain(when).map(AsRef::as_ref);
        let mut needs = diagnosis.conditions(conditions);
        needs.retain(Need::is_certain);
        if needs.is_empty() { Ok(()) } else { writeln!(f, "    needs: {}", NeedList(&needs)) }
    }

    /// Lists active selections with their locations, and the names of all others.
    fn fmt_selections(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        selections: &[Selection],
    ) -> fmt::Result {
        let in_force =
            |selection: &&Selection| self.config.is_some_and(|config| is_active(selection, config));
        let (active, idle): (Vec<&Selection>, Vec<&Selection>) = selections.iter().partition(in_force);
        let (shown, rest) = active.split_at(active.len().min(MAX_SELECTIONS));
        for Selection { by, at, .. } in shown {
            writeln!(f, "  {title}: CONFIG_{by}, which is set ({at})")?;
        }
        // One symbol may select another on several conditions.
        let is_shown = |other: &&&Selection| shown.iter().any(|selection| selection.by == other.by);
        let others = rest.iter().chain(&idle).filter(|other| !is_shown(other));
        let mut names: Vec<String> = others.map(|other| format!("CONFIG_{}", other.by)).collect();
        names.sort();
        names.dedup();
        if names.is_empty() {
            return Ok(());
        }
        let also = if shown.is_empty() { "" } else { "also " };
        writeln!(f, "  {also}{title}: {}", listed(&names, "and"))
    }
}

/// Whether a kernel can be built without this fragment.
fn is_optional(fragment: &Fragment) -> bool {
    fragment.origin == Origin::Optional
}

fn fmt_help(f: &mut fmt::Formatter<'_>, symbol: &Symbol) -> fmt::Result {
    let Some(help) = symbol.help() else { return Ok(()) };
    writeln!(f, "  help:")?;
    for line in help.lines().take(MAX_HELP_LINES) {
        writeln!(f, "{}", format!("    {line}").trim_end())?;
    }
    if help.lines().count() > MAX_HELP_LINES { writeln!(f, "    ...") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KCONFIG: &str = r#"
config PAT
	bool "PAT support" if EXPERT
	depends on MTRR && X86
	default y if X86
	help
	  Page attributes.

	  See the manual.
config EXPERT
	bool "expert"
config MTRR
	bool "mtrr"
config X86
	def_bool y
	select CLOCK
	select CLOCK if EXPERT
config OTHER
	bool "other"
	select CLOCK
	imply PAT
config CLOCK
	bool
choice
	prompt "Timer"
config SLOW
	bool "slow"
config FAST
	bool "fast"
endchoice
"#;

    fn explained(symbol: &str, config: Option<&str>) -> String {
        let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
        let base = "CONFIG_PAT=y # Huge pages.\n";
        let base = Fragment::parse("base", base.as_bytes(), Origin::Default).unwrap();
        let user = Fragment::parse("my.config", b"\nCONFIG_PAT=n\n", Origin::User).unwrap();
        let config = config.map(|text| KernelConfig::parse(text).unwrap());
        explain(symbol, &kconfig, config.as_ref(), &[base, user])
    }

    #[test]
    fn with_a_configuration() {
        let expected = r#"CONFIG_PAT is not set
  requested: y at base.config:1: Huge pages.
  requested: n at my.config:2: (no reason given)
  defined at Kconfig:2 (bool)
    prompt: "PAT support"
    only if: EXPERT [=n] (Kconfig:3)
    depends on: MTRR [=n] && X86 [=y] (Kconfig:4)
    needs: CONFIG_MTRR (is not set) and CONFIG_EXPERT (is not set)
    default: y if X86 [=y]
  implied by: CONFIG_OTHER
  help:
    Page attributes.

    See the manual.
"#;
        assert_eq!(explained("CONFIG_PAT", Some("CONFIG_X86=y\n")), expected);
    }

    #[test]
    fn without_a_configuration() {
        let expected = "CONFIG_CLOCK
  requested: by no fragment
  defined at Kconfig:22 (bool)
    no prompt: it cannot be set directly
  selected by: CONFIG_OTHER and CONFIG_X86
";
        assert_eq!(explained("CLOCK", None), expected);
    }

    #[test]
    fn active_selections_come_first() {
        let text = explained("CLOCK", Some("CONFIG_X86=y\nCONFIG_CLOCK=y\n"));
        let selections = "  selected by: CONFIG_X86, which is set (Kconfig:16)\n  \
                          also selected by: CONFIG_OTHER\n";
        assert!(text.ends_with(selections), "{text}");
    }

    #[test]
    fn a_member_of_a_choice_that_an_optional_fragment_requests() {
        let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
        let debug = Fragment::parse("debug", b"CONFIG_SLOW=y # Why.", Origin::Optional).unwrap();
        let config = KernelConfig::parse("CONFIG_FAST=y\n").unwrap();
        let expected = r#"CONFIG_SLOW is not set
  requested: y at debug.config:1 (an optional fragment): Why.
  defined at Kconfig:26 (bool)
    prompt: "slow"
    member of the choice "Timer": SLOW, FAST; selected: FAST
"#;
        assert_eq!(explain("SLOW", &kconfig, Some(&config), &[debug]), expected);
    }

    #[test]
    fn an_unknown_symbol() {
        let expected = "CONFIG_CLOK: this kernel has no such symbol
  did you mean CONFIG_CLOCK?
  requested: by no fragment
";
        assert_eq!(explained("CLOK", None), expected);
    }
}
