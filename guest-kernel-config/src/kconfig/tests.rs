//! Tests of the reader on small made-up trees.

use std::io;

use super::*;
use crate::config::KernelConfig;

/// Reads a tree given as (path, text) pairs.
fn tree(files: &[(&str, &str)]) -> Result<Kconfig, KconfigError> {
    Kconfig::read(&|path: &str| {
        files
            .iter()
            .find(|(name, _)| *name == path)
            .map(|(_, text)| text.as_bytes().to_vec())
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    })
}

fn one(text: &str) -> Kconfig {
    tree(&[("Kconfig", text)]).unwrap()
}

/// The conditions as text, with their locations.
fn texts(conditions: &Conditions) -> Vec<String> {
    conditions.iter().map(|c| format!("{} @{}", c.expr, c.at.line)).collect()
}

#[test]
fn a_symbol_with_everything() {
    let kconfig = one(r#"
mainmenu "Linux/$(ARCH) $(KERNELVERSION)"
config CPUS
	int "How many" if SMP
	range 1 16 if SMALL
	range 2 64
	default "64" if BIG
	default 8
	depends on X86 \
	   && SMP
	help
	  The number of CPUs.

	  More text.
"#);
    let symbol = kconfig.symbol("CONFIG_CPUS").unwrap();
    let [definition] = symbol.definitions.as_slice() else { panic!("{symbol:?}") };
    assert_eq!(symbol.kind(), Some(Kind::Int));
    assert_eq!(symbol.help(), Some("The number of CPUs.\n\nMore text."));
    assert_eq!(definition.at.to_string(), "Kconfig:3");
    assert_eq!(texts(&definition.depends), ["X86 && SMP @9"]);
    let prompt = definition.prompt.as_ref().unwrap();
    assert_eq!(prompt.text, "How many");
    assert_eq!(texts(&prompt.when), ["SMP @4"]);
    let ranges: Vec<_> = definition.ranges.iter().map(|r| r.value.1.to_string()).collect();
    assert_eq!(ranges, ["16", "64"]);
    let defaults: Vec<_> = definition.defaults.iter().map(|d| d.value.to_string()).collect();
    assert_eq!(defaults, ["64", "8"]);
    assert!(kconfig.symbol("SMP").is_none(), "a mention is no definition");
}

#[test]
fn enclosing_blocks_become_dependencies() {
    let kconfig = one(r#"
if NET
menu "Drivers"
	depends on PCI
	visible if EXPERT
comment "Nothing here"
	depends on NEVER
config CARD
	tristate "card"
	depends on DMA
endmenu
config LATER
	bool
endif
config OUTSIDE
	bool
"#);
    let definition = |name: &str| &kconfig.symbol(name).unwrap().definitions[0];
    let card = definition("CARD");
    assert_eq!(texts(&card.depends), ["NET @2", "PCI @4", "DMA @10"]);
    assert_eq!(texts(&card.prompt.as_ref().unwrap().when), ["EXPERT @5"]);
    assert_eq!(texts(&definition("LATER").depends), ["NET @2"]);
    assert_eq!(texts(&definition("OUTSIDE").depends), [""; 0]);
}

#[test]
fn a_choice_lists_its_members() {
    let kconfig = one(r#"
choice
	prompt "Preemption" if EXPERT
	default NONE
	depends on SMP
	help
	  Choose.
config NONE
	bool "none"
if ARCH_HAS_FULL
config FULL
	bool "full"
endif
endchoice
choice OLD
	bool "old style"
	optional
config A
	bool "a"
endchoice
config AFTER
	bool
"#);
    let full = &kconfig.symbol("FULL").unwrap().definitions[0];
    let choice = kconfig.choice(full.choice.unwrap()).unwrap();
    assert_eq!((choice.prompt.as_str(), choice.at.line), ("Preemption", 2));
    assert_eq!(choice.members, ["NONE", "FULL"]);
    assert_eq!(texts(&full.depends), ["SMP @5", "ARCH_HAS_FULL @10"]);
    assert_eq!(texts(&full.prompt.as_ref().unwrap().when), [""; 0]);
    assert_eq!(kconfig.choice(1).unwrap().prompt, "old style");
    assert_eq!(kconfig.symbol("AFTER").unwrap().definitions[0].choice, None);
}

#[test]
fn selections_are_recorded_at_the_selected_symbol() {
    let kconfig = one(r#"
if X86
config GUEST
	bool "guest"
	select CLOCK
	imply EXTRA if SMP
	depends on PARAVIRT
endif
config CLOCK
	bool
"#);
    let clock = kconfig.symbol("CLOCK").unwrap();
    let [selection] = clock.selected_by.as_slice() else { panic!("{clock:?}") };
    assert_eq!((selection.by.as_str(), selection.at.line), ("GUEST", 5));
    // A `depends on` after the select counts too.
    assert_eq!(texts(&selection.when), ["X86 @2", "PARAVIRT @7"]);
    let extra = &kconfig.symbols["EXTRA"];
    assert_eq!(texts(&extra.implied_by[0].when), ["X86 @2", "PARAVIRT @7", "SMP @6"]);
    assert!(kconfig.symbol("EXTRA").is_none());
}

#[test]
fn several_definitions_and_sourced_files() {
    let kconfig = tree(&[
        ("Kconfig", "source \"arch/$(SRCARCH)/Kconfig\"\nconfig A\n\tbool\n\tdefault y\n"),
        ("arch/x86/Kconfig", "if X\nsource \"$(srctree)/lib/Kconfig\"\nendif\nrsource \"sub/K\"\n"),
        ("lib/Kconfig", "config A\n\tbool \"a\"\n"),
        ("arch/x86/sub/K", "config B\n\tdef_tristate m\n"),
    ])
    .unwrap();
    let places: Vec<String> =
        kconfig.symbol("A").unwrap().definitions.iter().map(|d| d.at.to_string()).collect();
    assert_eq!(places, ["lib/Kconfig:1", "Kconfig:2"]);
    let depends = &kconfig.symbol("A").unwrap().definitions[0].depends;
    assert_eq!(depends[0].at.to_string(), "arch/x86/Kconfig:1");

    let b = kconfig.symbol("B").unwrap();
    assert_eq!(b.kind(), Some(Kind::Tristate));
    let default = &b.definitions[0].defaults[0].value;
    assert_eq!(default.truth(&KernelConfig::default()), Truth::No, "m without modules is n");
}

#[test]
fn macros_are_unknown() {
    let kconfig = one(r#"
cc-option = $(success,$(CC) $(1))
$(error-if,n,no compiler)
config CC_HAS_X
	def_bool $(cc-option,-fx)
config Y
	bool "y"
	depends on $(success,test "$(a)" = (b)) && "$(ARCH)" = "x86"
"#);
    let empty = KernelConfig::default();
    let default = &kconfig.symbol("CC_HAS_X").unwrap().definitions[0].defaults[0].value;
    assert_eq!(*default, Expr::Term(Term::Unknown("$(cc-option,-fx)".into())));
    let Expr::And(parts) = &kconfig.symbol("Y").unwrap().definitions[0].depends[0].expr else {
        panic!("no &&")
    };
    assert_eq!(parts[0].truth(&empty), Truth::Unknown);
    assert_eq!(parts[1].truth(&empty), Truth::Yes);
}

#[test]
fn errors_of_malformed_files_name_the_location() {
    let cases = [
        ("config\n", "Kconfig:1: expected a symbol, found the end of the line"),
        ("config \"A\"\n", "Kconfig:1: expected a symbol, found \"A\""),
        ("config A B\n", "Kconfig:1: expected nothing more, found B"),
        ("\"A\"\n", "Kconfig:1: expected a statement, found \"A\""),
        ("config A\n\tbool b\n", "Kconfig:2: expected a prompt in quotes, found b"),
        ("config A\n\tdepends A\n", "Kconfig:2: expected \"on\", found A"),
        ("config A\n\tdepends on\n", "Kconfig:2: expected a symbol or a value, found the end of the line"),
        (
            "config A\n\tdepends on B &&\n",
            "Kconfig:2: expected a symbol or a value, found the end of the line",
        ),
        (
            "config A\n\tdepends on (B\n",
            "Kconfig:2: expected a closing parenthesis, found the end of the line",
        ),
        ("config A\n\tdepends on B C\n", "Kconfig:2: expected nothing more, found C"),
        ("config A\n\tdepends on B = = C\n", "Kconfig:2: expected a symbol or a value, found ="),
        ("config A\n\tselect\n", "Kconfig:2: expected a symbol, found the end of the line"),
        ("config A\n\trange 1\n", "Kconfig:2: expected a symbol or a value, found the end of the line"),
        ("config A\n\tbogus\n", "Kconfig:2: \"bogus\" is not a Kconfig statement"),
        ("bogus A\n", "Kconfig:1: \"bogus\" is not a Kconfig statement"),
        ("depends on A\n", "Kconfig:1: \"depends\" outside of an entry that can have it"),
        ("if A\nbool\nendif\n", "Kconfig:2: \"bool\" outside of an entry that can have it"),
        ("menu \"m\"\n\tselect A\nendmenu\n", "Kconfig:2: \"select\" outside of an entry that can have it"),
        ("help\n  x\n", "Kconfig:1: \"help\" outside of an entry that can have it"),
        ("menu m\n", "Kconfig:1: expected a title in quotes, found m"),
        ("endif\n", "Kconfig:1: endif without a matching block in this file"),
        ("if A\nendmenu\n", "Kconfig:2: endmenu without a matching block in this file"),
        ("\nif A\nconfig B\n", "Kconfig:2: this if is not closed"),
        ("choice\n\tprompt \"c\"\n", "Kconfig:1: this choice is not closed"),
        ("source Kconfig.sub\n", "Kconfig:1: unexpected character '.'"),
        ("source \"$(shell,id)/Kconfig\"\n", "Kconfig:1: the value of \"$(shell,id)/Kconfig\" is unknown"),
        ("source \"../Kconfig\"\n", "Kconfig:1: \"../Kconfig\" is outside the kernel tree"),
        ("source \"/etc/passwd\"\n", "Kconfig:1: \"/etc/passwd\" is outside the kernel tree"),
        ("source \"missing\"\n", "missing: cannot be read (sourced at Kconfig:1)"),
        ("\nsource \"Kconfig\"\n", "Kconfig:2: Kconfig is sourced more than 32 files deep"),
    ];
    for (text, message) in cases {
        let error = tree(&[("Kconfig", text)]).unwrap_err();
        assert_eq!(error.to_string(), message, "{text:?}");
    }
    assert_eq!(tree(&[]).unwrap_err().to_string(), "Kconfig: cannot be read");
}

#[test]
fn a_block_must_close_in_its_own_file() {
    let error = tree(&[("Kconfig", "if A\nsource \"b\"\n"), ("b", "endif\n")]).unwrap_err();
    assert_eq!(error.to_string(), "b:1: endif without a matching block in this file");
    let error = tree(&[("Kconfig", "source \"b\"\nendif\n"), ("b", "if A\n")]).unwrap_err();
    assert_eq!(error.to_string(), "b:1: this if is not closed");
}

#[test]
fn sizes_and_depths_are_bounded() {
    let nested = format!("if {}A{}\nendif\n", "(".repeat(1000), ")".repeat(1000));
    let error = tree(&[("Kconfig", &nested)]).unwrap_err();
    assert!(matches!(error, KconfigError::TooNested { limit: 64, .. }), "{error}");

    // Negations do not count as nesting.
    let negated = format!("if {}A\nendif\n", "!".repeat(100_000));
    assert!(tree(&[("Kconfig", &negated)]).is_ok());

    let error = tree(&[("Kconfig", &"if A\n".repeat(1000))]).unwrap_err();
    assert!(matches!(error, KconfigError::TooManyBlocks { limit: 128, .. }), "{error}");

    let big = "#".repeat(MAX_KCONFIG_BYTES + 1);
    let error = tree(&[("Kconfig", &big)]).unwrap_err();
    assert_eq!(error.to_string(), "Kconfig: larger than 1048576 bytes, not a Kconfig file");

    let error = Kconfig::read(&|_: &str| Ok(vec![0xff])).unwrap_err();
    assert_eq!(error.to_string(), "Kconfig: not text");
}

#[test]
fn the_number_of_sourced_files_is_bounded() {
    // Twenty files, each of which sources the next one twice: a million reads.
    let error = Kconfig::read(&|path: &str| {
        let number: usize = path.strip_prefix("k").and_then(|n| n.parse().ok()).unwrap_or(0);
        let line = format!("source \"k{}\"\n", number + 1);
        Ok(if number < 20 { line.repeat(2).into_bytes() } else { Vec::new() })
    })
    .unwrap_err();
    assert!(matches!(error, KconfigError::TooManyFiles { limit: 10_000, .. }), "{error}");
}

#[test]
fn truncated_and_damaged_text_never_panics() {
    let text = r#"
menu "m" # c
	visible if A
if A && !(B || C = "x\"y") \
	|| $(success,a (b))
choice
	prompt "c" if D
	default E
config E
	int "e" if $(x)
	range 1 0x20 if F
	select G if H < 3
	default "$(ARCH)" if I
	help
	  Help — with a dash.
	  	more
endchoice
endif
endmenu
"#;
    let places: Vec<usize> = text.char_indices().map(|(place, _)| place).collect();
    let mut refused = 0;
    for (index, &start) in places.iter().enumerate() {
        for &end in &places[index..] {
            refused += usize::from(tree(&[("Kconfig", &text[start..end])]).is_err());
        }
        for stray in ["\"", "$(", "(", "\\", "\n", "if ", "\u{e9}"] {
            let (before, after) = text.split_at(start);
            let stray = format!("{before}{stray}{after}");
            refused += usize::from(tree(&[("Kconfig", &stray)]).is_err());
        }
    }
    assert!(refused > 0);
    assert!(tree(&[("Kconfig", text)]).is_ok());
}
