//! `kindling template`: creates, lists and removes templates.

use crate::command_line::{
    Argument, Command, Group, Opt, Store, flag, in_range, one, one_or_more, option, rest, store_as,
};
use crate::guests::view;
use crate::run::arguments::mebibytes;
use crate::text::json;
use crate::{STATUS_FAILURE, print, print_error};
use kindling::launch::LaunchError;
use kindling::snapshot::SnapshotError;
use kindling::template::{TemplateError, remove, templates};
use kindling::timeline::Instant;
use kindling::{Guest, Image, Template};
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) const COMMANDS: Group = Group {
    name: "template",
    about: "Manage templates, of which copies start",
    commands: &[&CREATE, &LS, &RM],
};

#[derive(Debug, PartialEq, Eq)]
struct Creation {
    name: String,
    image: OsString,
    command: Vec<OsString>,
    /// In MiB.
    memory: u64,
    cpus: u64,
    hostname: Option<OsString>,
    net: Option<OsString>,
}

impl Default for Creation {
    fn default() -> Self {
        Self {
            name: String::new(),
            image: OsString::new(),
            command: Vec::new(),
            memory: 512,
            cpus: 1,
            hostname: None,
            net: None,
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    names: Vec<String>,
    json: bool,
}

const CREATE: Command<Creation> = Command::new(
    "template create",
    "Run a command in a new guest, and save the guest, of which `kindling run --template` starts copies",
    create,
)
.options(OPTIONS)
.arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Creation>] = &[
    option("m", "memory", "MIB", |all, word| store_as(&mut all.memory, word, mebibytes),
        "Memory in MiB, or with the suffix m or g: 512, 512m, 2g [default: 512]"),
    option("", "cpus", "N", |all, word| store_as(&mut all.cpus, word, in_range(1..=16)),
        "Number of vCPUs, 1 to 16 [default: 1]"),
    option("", "hostname", "NAME", |all, word| all.hostname.store(word),
        "Hostname of the guest; each copy has its own [default: the name of the guest]"),
    option("", "net", "none|user", |all, word| all.net.store(word),
        "Network of the guest and of its copies: none, or user (through passt, without root) [default: none]"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Creation>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the template"),
    one("IMAGE", |all, word| all.image.store(word),
        "Image: a name of a registry, the path of a `docker save` archive or an OCI layout, or an EROFS \
         file"),
    rest("COMMAND", |all, word| all.command.store(word),
        "Command that prepares the guest; processes that it leaves run on in each copy"),
];

const LS: Command<Arguments> = Command::new("template ls", "List templates", list).options(&[flag(
    "",
    "json",
    |all| all.json = true,
    "Print all details as JSON",
)]);

const RM: Command<Arguments> =
    Command::new("template rm", "Remove templates; their copies run on", remove_all)
        .arguments(&[one_or_more("NAME", |all, word| all.names.store(word), "Names of the templates")]);

/// A command that prepared the guest of a template, and failed.
#[derive(Debug, thiserror::Error)]
#[error("the command ended with status {0}; no template was created")]
struct CommandFailed(u8);

fn create(arguments: &Creation, _: Instant) -> u8 {
    match try_create(arguments) {
        Ok(template) => print(format!("{}\n", template.name()).as_bytes()),
        Err(error) => {
            print_error(&error);
            match &error {
                SnapshotError::SetUp(reason) => {
                    reason.downcast_ref().map_or(STATUS_FAILURE, |CommandFailed(status)| *status)
                }
                error => crate::status(error.is_user_error()),
            }
        }
    }
}

fn try_create(arguments: &Creation) -> Result<Template, SnapshotError> {
    let image = Image::open(&arguments.image).map_err(LaunchError::from)?;
    let mut builder = Guest::builder(image).memory_mib(arguments.memory).vcpus(arguments.cpus);
    if let Some(name) = &arguments.hostname {
        builder = builder.hostname(name);
    }
    if let Some(network) = &arguments.net {
        builder = builder.network(network);
    }
    Template::create(&arguments.name, builder, |guest| {
        let Some((program, rest)) = arguments.command.split_first() else { return Ok(()) };
        match guest.command(program).args(rest).status()?.code() {
            0 => Ok(()),
            status => Err(CommandFailed(status).into()),
        }
    })
}

/// JSON form of a template.
#[derive(Serialize)]
struct View {
    name: String,
    path: PathBuf,
    image: String,
    memory_mib: u64,
    vcpus: u8,
    /// In seconds since 1970.
    created: u64,
    /// Space of the saved memory on the host in bytes.
    size: u64,
}

impl View {
    fn of(name: &str) -> Result<Self, TemplateError> {
        let template = Template::open(name)?;
        Ok(Self {
            name: template.name().to_owned(),
            path: template.folder().to_owned(),
            image: template.image_name().to_string_lossy().into_owned(),
            memory_mib: template.memory_mib(),
            vcpus: template.vcpus(),
            created: template.created(),
            size: template.size()?,
        })
    }

    fn row(&self) -> [String; 5] {
        const MIB: u64 = 1 << 20;
        [
            self.name.clone(),
            self.image.clone(),
            format!("{} MiB", self.memory_mib),
            self.vcpus.to_string(),
            format!("{} MiB", self.size.div_ceil(MIB)),
        ]
    }
}

fn list(arguments: &Arguments, _: Instant) -> u8 {
    let names = match templates() {
        Ok(names) => names,
        Err(error) => return finish(Err(error)),
    };
    let mut views = Vec::new();
    let mut status = 0;
    for result in names.iter().map(|name| View::of(name)) {
        match result {
            Ok(view) => views.push(view),
            // The others are listed all the same.
            Err(error) => status = finish(Err(error)),
        }
    }
    let text = if arguments.json {
        json(&views)
    } else {
        let rows: Vec<_> = views.iter().map(View::row).collect();
        view::table(["NAME", "IMAGE", "MEMORY", "VCPUS", "SAVED"], &rows)
    };
    finish(Ok(text)).max(status)
}

fn remove_all(arguments: &Arguments, _: Instant) -> u8 {
    // An error with one template does not prevent the others.
    let each = arguments.names.iter().map(|name| finish(remove(name).map(|()| format!("{name}\n"))));
    each.max().unwrap_or(0)
}

fn finish(result: Result<String, TemplateError>) -> u8 {
    crate::finish(result, TemplateError::is_user_error)
}
