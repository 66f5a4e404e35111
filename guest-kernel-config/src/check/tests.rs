//! A small made-up kernel, and every reason for a setting without effect.

use super::*;
use crate::compose;
use crate::fragment::{Fragment, Origin};

const KCONFIG: &str = r#"
config MTRR
	bool "mtrr"
config PAT
	bool "pat"
	depends on MTRR && !LEAN
config LEAN
	bool "lean"
config EXPERT
	bool "expert"
config FUTEX
	bool "futex" if EXPERT
	default y
config CLOCK
	bool
config BIG
	def_bool EXPERT
config GUEST
	bool "guest"
	select CLOCK
	select TWICE if EXPERT
config OTHER_GUEST
	bool "other"
	select CLOCK
config TWICE
	bool "twice"
config CPUS
	int "cpus" if !LEAN
	range 1 LIMIT
	default 4
config LIMIT
	int
	default 64
config START
	hex "start"
	range 0x1000 0x8000
config NAME
	string "name"
config FLAG
	bool "flag"
	depends on $(cc-option,-fflag)
choice
	prompt "Timer frequency"
config HZ_100
	bool "100"
config HZ_250
	bool "250"
endchoice
config DRIVER
	tristate "driver"
	depends on BUS
config BUS
	tristate "bus"
menu "Hidden"
	visible if EXPERT
config DEEP
	bool "deep"
endmenu
config TWO_WAYS
	bool "one"
	depends on MTRR && EXPERT
config TWO_WAYS
	bool "two"
	depends on LEAN
"#;

/// Checks a user's fragment together with a shipped fragment that requests GUEST and HZ_250.
fn messages(user: &str, result: &str) -> Vec<String> {
    let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
    let shipped = "CONFIG_GUEST=y # g\nCONFIG_HZ_250=y # h\n";
    let fragments = [
        Fragment::parse("kvm", shipped.as_bytes(), Origin::Default).unwrap(),
        Fragment::parse("my.config", user.as_bytes(), Origin::User).unwrap(),
    ];
    let result = format!("CONFIG_GUEST=y\nCONFIG_CLOCK=y\nCONFIG_HZ_250=y\n{result}");
    let result = KernelConfig::parse(&result).unwrap();
    match check(&compose(&fragments).unwrap(), &result, &kconfig) {
        Ok(()) => Vec::new(),
        Err(unmet) => unmet.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn met_requests_are_not_reported() {
    let setting = "CONFIG_MTRR=y\nCONFIG_PAT=n\nCONFIG_CPUS=16\nCONFIG_NAME=\"x\"\n";
    let empty: [&str; 0] = [];
    assert_eq!(messages(setting, "CONFIG_MTRR=y\nCONFIG_CPUS=16\nCONFIG_NAME=\"x\"\n"), empty);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_reason_has_its_message() {
    let cases = [
        ("CONFIG_NOSUCH=y", "", "is not set", "this kernel has no such symbol"),
        ("CONFIG_FUTEXES=n", "CONFIG_FUTEX=y", "is not set", "this kernel has no such symbol"),
        (
            "CONFIG_OTHERGUEST=y",
            "",
            "is not set",
            "this kernel has no such symbol; did you mean CONFIG_OTHER_GUEST?",
        ),
        ("CONFIG_PAT=y", "", "is not set", "it needs CONFIG_MTRR (is not set)"),
        (
            "CONFIG_PAT=y",
            "CONFIG_LEAN=y",
            "is not set",
            "it needs CONFIG_MTRR (is not set) and CONFIG_LEAN off (is y)",
        ),
        ("CONFIG_CLOCK=n", "", "is y", "CONFIG_GUEST (requested at kvm.config:1) selects it"),
        (
            "CONFIG_CLOCK=n",
            "CONFIG_OTHER_GUEST=y",
            "is y",
            "CONFIG_GUEST (requested at kvm.config:1) and CONFIG_OTHER_GUEST select it",
        ),
        (
            "CONFIG_TWICE=n",
            "CONFIG_EXPERT=y\nCONFIG_TWICE=y",
            "is y",
            "CONFIG_GUEST (requested at kvm.config:1) selects it",
        ),
        (
            "CONFIG_FUTEX=n",
            "CONFIG_FUTEX=y",
            "is y",
            "it keeps its default; setting it needs CONFIG_EXPERT (is not set)",
        ),
        (
            "CONFIG_BIG=y",
            "",
            "is not set",
            "it cannot be set directly (it has no prompt); its default decides",
        ),
        ("CONFIG_NAME=y", "", "is not set", "the symbol is a string: \"...\""),
        ("CONFIG_START=16", "CONFIG_START=0x0", "is 0x0", "the symbol is a hexadecimal number: 0x..."),
        ("CONFIG_START=0x10", "CONFIG_START=0x1000", "is 0x1000", "it must be from 0x1000 to 0x8000"),
        ("CONFIG_CPUS=65", "CONFIG_CPUS=64\nCONFIG_LIMIT=64", "is 64", "it must be from 1 to 64"),
        (
            "CONFIG_CPUS=8",
            "CONFIG_CPUS=4\nCONFIG_LEAN=y",
            "is 4",
            "it keeps its default; setting it needs CONFIG_LEAN off (is y)",
        ),
        (
            "CONFIG_HZ_100=y",
            "",
            "is not set",
            "the choice \"Timer frequency\" is set to CONFIG_HZ_250 (requested at kvm.config:2); \
             if that is intended, request CONFIG_HZ_100=n",
        ),
        (
            "CONFIG_HZ_250=n",
            "",
            "is y",
            "one member of the choice \"Timer frequency\" must be y; request another member",
        ),
        ("CONFIG_DRIVER=y", "CONFIG_DRIVER=m\nCONFIG_BUS=m", "is m", "it needs CONFIG_BUS (is m)"),
        ("CONFIG_DEEP=y", "", "is not set", "it needs CONFIG_EXPERT (is not set)"),
        ("CONFIG_TWO_WAYS=y", "", "is not set", "it needs CONFIG_LEAN (is not set)"),
        (
            "CONFIG_FLAG=y",
            "",
            "is not set",
            "it depends on $(cc-option,-fflag) (a test that is not run here)",
        ),
        (
            "CONFIG_MTRR=y",
            "",
            "is not set",
            "no reason found; was the text appended before make olddefconfig?",
        ),
    ];
    for (setting, result, state, reason) in cases {
        let first = format!("my.config:1: {setting} has no effect: the symbol {state}\n    {reason}");
        assert_eq!(messages(setting, result), [first], "{setting} in {result:?}");
    }
}

#[test]
fn symbols_without_a_prompt_name_what_sets_them() {
    let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
    let fragment = Fragment::parse("my.config", b"CONFIG_CLOCK=y\n", Origin::User).unwrap();
    let requests = compose(&[fragment]).unwrap();
    let unmet = check(&requests, &KernelConfig::default(), &kconfig).unwrap_err();
    let selected_by = vec!["GUEST".to_owned(), "OTHER_GUEST".to_owned()];
    assert_eq!(unmet[0].reason, Reason::NoPrompt { selected_by });
    assert_eq!(
        unmet[0].to_string(),
        "my.config:1: CONFIG_CLOCK=y has no effect: the symbol is not set\n    \
         it cannot be set directly (it has no prompt); \
         it is set by CONFIG_GUEST or CONFIG_OTHER_GUEST"
    );
}
