//! The command line, with the options of Firecracker's jailer (docs/jailer.md in its repository).

use lexopt::Arg;
use rustix::process::Resource;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

pub(crate) const HELP: &str = "\
Start a program in a chroot, as another user, with the command line of Firecracker's jailer

Usage: kindling-jailer --id ID --exec-file FILE --uid UID --gid GID [OPTIONS] [-- ARGUMENTS...]

Options:
      --id ID                        Name of the machine: 1 to 64 letters, digits and hyphens
      --exec-file FILE               Program to execute, such as /usr/bin/kindling: statically linked, and owned by root
      --uid UID, --gid GID           User and group of the program
      --chroot-base-dir DIR          Parent of the root directories [default: /srv/jailer]; the root directory of the program
                                     is DIR/PROGRAM/ID/root
      --netns FILE                   Network namespace to join, such as /run/netns/NAME
      --cgroup-version 2             The only version that is supported [default: 2]
      --cgroup FILE=VALUE            Setting of the program's cgroup, such as memory.max=1G (repeatable)
      --parent-cgroup CGROUP         Parent of the program's cgroup, which has the name ID [default with --cgroup: the name of
                                     the program]
      --resource-limit NAME=VALUE    Limit of resources: fsize, no-file (repeatable) [default: no-file=2048]
      --new-pid-ns                   Start the program as the first process of a PID namespace, in the background
      --daemonize                    Start it in a new session, in the background, with /dev/null as standard streams
  -h, --help                         Print help

The arguments are those of the program; `boot` is put before those of a program `kindling` that start with an option.
Exit status: that of the program, 0 if it runs in the background, 2 for an invalid request, 125 if the host refuses something.
";

/// Maximum number of descriptors, as Firecracker's jailer sets it.
const DEFAULT_DESCRIPTORS: u64 = 2048;
const DEFAULT_BASE: &str = "/srv/jailer";

/// An invalid command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; --help lists the options")]
pub(crate) struct Invalid(String);

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) id: String,
    pub(crate) exec_file: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) chroot_base_dir: PathBuf,
    pub(crate) netns: Option<PathBuf>,
    /// Files of the cgroup, and their contents.
    pub(crate) cgroup: Vec<(String, String)>,
    /// Path of the parent of the cgroup in the hierarchy. `None` if the program gets no cgroup.
    pub(crate) parent_cgroup: Option<PathBuf>,
    pub(crate) resource_limits: Vec<(Resource, u64)>,
    pub(crate) new_pid_ns: bool,
    pub(crate) daemonize: bool,
    /// Those of the program.
    pub(crate) arguments: Vec<OsString>,
}

/// Options without defaults, as they are found.
#[derive(Default)]
struct Found {
    id: Option<String>,
    exec_file: Option<PathBuf>,
    uid: Option<u32>,
    gid: Option<u32>,
    parent_cgroup: Option<String>,
}

impl Arguments {
    /// Parses a command line. Returns `None` if it asks for help.
    pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, Invalid> {
        let mut found = Found::default();
        let mut this = Self {
            id: String::new(),
            exec_file: PathBuf::new(),
            uid: 0,
            gid: 0,
            chroot_base_dir: DEFAULT_BASE.into(),
            netns: None,
            cgroup: Vec::new(),
            parent_cgroup: None,
            resource_limits: vec![(Resource::Nofile, DEFAULT_DESCRIPTORS)],
            new_pid_ns: false,
            daemonize: false,
            arguments: Vec::new(),
        };
        let mut words = words.into_iter();
        let own: Vec<_> = words.by_ref().take_while(|word| word != "--").collect();
        this.arguments = words.collect();
        let mut parser = lexopt::Parser::from_args(own);
        while let Some(argument) = parser.next().map_err(|error| Invalid(error.to_string()))? {
            let name = match argument {
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                Arg::Long("new-pid-ns") => {
                    this.new_pid_ns = true;
                    continue;
                }
                Arg::Long("daemonize") => {
                    this.daemonize = true;
                    continue;
                }
                Arg::Long(name) => name.to_owned(),
                Arg::Short(letter) => return Err(Invalid(format!("unknown option -{letter}"))),
                Arg::Value(word) => {
                    return Err(Invalid(format!("{word:?} is no option; those of the program follow --")));
                }
            };
            let value = parser.value().map_err(|error| Invalid(error.to_string()))?;
            this.store(&mut found, &name, &value)
                .map_err(|why| Invalid(format!("--{name} {value:?}: {why}")))?;
        }
        this.complete(found).map(Some)
    }

    fn store(&mut self, found: &mut Found, name: &str, value: &OsStr) -> Result<(), String> {
        let text = || value.to_str().ok_or_else(|| "expected text in UTF-8".to_owned());
        // The kernel takes the last one for "no change".
        let number = || {
            let number = text()?.parse::<u32>().ok().filter(|&number| number != u32::MAX);
            number.ok_or_else(|| "expected a number from 0 to 4294967294".to_owned())
        };
        match name {
            "id" => found.id = Some(id(text()?)?),
            "exec-file" => found.exec_file = Some(absolute(value)?),
            "uid" => found.uid = Some(number()?),
            "gid" => found.gid = Some(number()?),
            "chroot-base-dir" => self.chroot_base_dir = absolute(value)?,
            "netns" => self.netns = Some(absolute(value)?),
            "cgroup-version" if text()? == "2" => {}
            "cgroup-version" => return Err("only version 2 is supported".to_owned()),
            "cgroup" => self.cgroup.push(setting(text()?)?),
            "parent-cgroup" => found.parent_cgroup = Some(relative(text()?)?),
            "resource-limit" => {
                let (resource, limit) = resource_limit(text()?)?;
                self.resource_limits.retain(|(other, _)| *other != resource);
                self.resource_limits.push((resource, limit));
            }
            _ => return Err("unknown option".to_owned()),
        }
        Ok(())
    }

    fn complete(mut self, found: Found) -> Result<Self, Invalid> {
        let missing = |name: &str| Invalid(format!("--{name} is missing"));
        self.id = found.id.ok_or_else(|| missing("id"))?;
        self.exec_file = found.exec_file.ok_or_else(|| missing("exec-file"))?;
        self.uid = found.uid.ok_or_else(|| missing("uid"))?;
        self.gid = found.gid.ok_or_else(|| missing("gid"))?;
        let name = self.program_name().to_owned();
        let default = (!self.cgroup.is_empty()).then(|| PathBuf::from(&name));
        self.parent_cgroup = found.parent_cgroup.map(PathBuf::from).or(default);
        if name == "kindling"
            && self.arguments.first().is_none_or(|word| word.as_encoded_bytes().starts_with(b"-"))
        {
            self.arguments.insert(0, "boot".into());
        }
        Ok(self)
    }

    /// The name of the program, which is a part of the path of its root directory.
    pub(crate) fn program_name(&self) -> &OsStr {
        self.exec_file.file_name().unwrap_or_default()
    }
}

fn id(text: &str) -> Result<String, String> {
    let is_valid = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match text.len() {
        1..=64 if is_valid => Ok(text.to_owned()),
        _ => Err("expected 1 to 64 letters, digits and hyphens".to_owned()),
    }
}

fn absolute(value: &OsStr) -> Result<PathBuf, String> {
    let path = Path::new(value);
    if value.is_empty() {
        return Err("a path is not empty".to_owned());
    }
    std::path::absolute(path).map_err(|error| error.to_string())
}

/// The path of a cgroup below the root of the hierarchy.
fn relative(text: &str) -> Result<String, String> {
    let path = Path::new(text);
    let is_plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if text.is_empty() || !is_plain {
        return Err("expected a relative path of a cgroup, such as machines/small".to_owned());
    }
    Ok(text.to_owned())
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (file, value) = text.split_once('=').ok_or("expected FILE=VALUE, such as memory.max=1G")?;
    // `cgroup.procs` and others are not limits.
    let is_file = file.contains('.')
        && !file.starts_with("cgroup.")
        && file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
    if !is_file || value.is_empty() {
        return Err("expected a file of a controller and a value, such as memory.max=1G".to_owned());
    }
    Ok((file.to_owned(), value.to_owned()))
}

fn resource_limit(text: &str) -> Result<(Resource, u64), String> {
    const FORM: &str = "expected fsize=BYTES or no-file=DESCRIPTORS";
    let (name, value) = text.split_once('=').ok_or(FORM)?;
    let resource = match name {
        "fsize" => Resource::Fsize,
        "no-file" => Resource::Nofile,
        _ => return Err(FORM.to_owned()),
    };
    let is_number = value.bytes().all(|byte| byte.is_ascii_digit());
    Ok((resource, value.parse().ok().filter(|_| is_number).ok_or(FORM)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Arguments>, String> {
        Arguments::parse(line.split(' ').map(OsString::from)).map_err(|error| error.to_string())
    }

    const NEEDED: &str = "--id a-1 --exec-file /usr/bin/kindling --uid 1000 --gid 1001";

    #[test]
    fn every_option_is_stored() {
        let expected = Arguments {
            id: "a-1".into(),
            exec_file: "/usr/bin/kindling".into(),
            uid: 1000,
            gid: 1001,
            chroot_base_dir: "/jails".into(),
            netns: Some("/run/netns/n".into()),
            cgroup: vec![("memory.max".into(), "1G".into()), ("cpu.max".into(), "5000 10000".into())],
            parent_cgroup: Some("all/small".into()),
            resource_limits: vec![(Resource::Fsize, 9), (Resource::Nofile, 100)],
            new_pid_ns: true,
            daemonize: true,
            arguments: vec!["run".into(), "--id".into(), "x".into()],
        };
        let more = "--chroot-base-dir /jails --netns=/run/netns/n --cgroup-version 2 --cgroup memory.max=1G \
                    --parent-cgroup all/small --resource-limit fsize=9 --resource-limit no-file=100 --new-pid-ns --daemonize";
        let words =
            NEEDED.split(' ').chain(more.split_whitespace()).chain(["--cgroup", "cpu.max=5000 10000"]);
        let words = words.chain(["--", "run", "--id", "x"]).map(OsString::from);
        assert_eq!(Arguments::parse(words), Ok(Some(expected)));
    }

    #[test]
    fn the_options_of_firecracker_are_those_of_boot() {
        let arguments = parse(&format!("{NEEDED} -- --config-file vm.json")).unwrap().unwrap();
        assert_eq!(arguments.arguments, ["boot", "--config-file", "vm.json"]);
        assert_eq!(arguments.chroot_base_dir, Path::new("/srv/jailer"));
        assert_eq!(arguments.parent_cgroup, None);
        let limited = parse(&format!("{NEEDED} --cgroup memory.max=1G")).unwrap().unwrap();
        assert_eq!(limited.parent_cgroup, Some("kindling".into()));
        assert_eq!(arguments.resource_limits, [(Resource::Nofile, 2048)]);
        assert_eq!(parse(NEEDED).unwrap().unwrap().arguments, ["boot"]);
        let other = parse("--id a --exec-file /bin/other --uid 1 --gid 1 -- -x").unwrap().unwrap();
        assert_eq!(other.arguments, ["-x"]);
        assert_eq!(parse("--id a --help"), Ok(None));
    }

    #[test]
    fn errors_name_the_option() {
        for (line, expected) in [
            ("--uid 1", "--id is missing"),
            ("--id a", "--exec-file is missing"),
            ("--id a/../b", "--id \"a/../b\": expected 1 to 64 letters"),
            ("--id ", "--id \"\": expected 1 to 64 letters"),
            ("--uid root", "--uid \"root\": expected a number"),
            ("--uid -1", "--uid \"-1\": expected a number"),
            ("--uid 4294967295", "--uid \"4294967295\": expected a number from 0 to 4294967294"),
            ("--gid 4294967296", "--gid \"4294967296\": expected a number"),
            ("--cgroup-version 1", "--cgroup-version \"1\": only version 2"),
            ("--cgroup memory.max", "--cgroup \"memory.max\": expected FILE=VALUE"),
            ("--cgroup cgroup.procs=1", "--cgroup \"cgroup.procs=1\": expected a file"),
            ("--cgroup ../a.b=1", "--cgroup \"../a.b=1\": expected a file"),
            ("--parent-cgroup ../a", "--parent-cgroup \"../a\": expected a relative path"),
            ("--parent-cgroup /a", "--parent-cgroup \"/a\": expected a relative path"),
            ("--resource-limit nproc=1", "--resource-limit \"nproc=1\": expected fsize=BYTES"),
            ("--resource-limit fsize=+1", "--resource-limit \"fsize=+1\": expected fsize=BYTES"),
            ("--exec-file ", "--exec-file \"\": a path is not empty"),
            ("--seccomp-level 2", "--seccomp-level \"2\": unknown option"),
            ("vm.json", "\"vm.json\" is no option"),
            ("-x", "unknown option -x"),
            ("--netns", "missing argument for option '--netns'"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.starts_with(expected), "{line}: {error}");
            assert!(error.ends_with("; --help lists the options"), "{error}");
        }
        assert!(id(&"a".repeat(65)).is_err());
    }
}
