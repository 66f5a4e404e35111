//! `cargo xtask transcripts`: runs the commands whose output README.md and docs show, and updates it there.
//!
//! Such output is a fenced block after a comment with its command. After `<!-- transcript: cargo xtask run -->` the
//! block has the command and what it prints to standard output and standard error, as on a terminal. After `<!--
//! output: cargo xtask bench ... -->` the block has its standard output.

use crate::host::workspace;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Run only commands that contain this; without it, all commands are run, which takes an hour
    filter: Option<String>,
}

/// The start of a comment with a command, and the content of the block that follows.
const MARKS: [(&str, Shown); 2] =
    [("<!-- transcript: ", Shown::Transcript), ("<!-- output: ", Shown::Output)];
const MARK_END: &str = " -->\n";
const FENCE: &str = "```text\n";
const FENCE_END: &str = "\n```";
/// Placeholder in a command for the path of Firecracker.
const FIRECRACKER: &str = "firecracker=PATH";

/// The content of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The command, its standard output and its standard error.
    Transcript,
    /// Its standard output.
    Output,
}

/// Updates the blocks of all matching commands, and prints which files changed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let filter = arguments.filter.as_deref().unwrap_or_default();
    let mut found = false;
    for file in documents()? {
        let text = fs::read_to_string(&file)?;
        let output = |command: &str, shown| {
            if !command.contains(filter) {
                return Ok(None);
            }
            found = true;
            output_of(command, shown)
        };
        let new = replaced(&text, output).with_context(|| format!("{}", file.display()))?;
        if new != text {
            fs::write(&file, new).with_context(|| format!("cannot write {}", file.display()))?;
            println!("{}", file.display());
        }
    }
    ensure!(found, "no command in README.md and docs contains {filter:?}");
    Ok(0)
}

fn documents() -> Result<Vec<PathBuf>> {
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let pages = fs::read_dir(workspace().join("docs"))?.map(|entry| entry.map(|entry| entry.path()));
    let mut files = pages.collect::<std::io::Result<Vec<_>>>()?;
    files.retain(is_page);
    files.push(workspace().join("README.md"));
    files.sort();
    Ok(files)
}

/// Replaces the block of each command by its output. A command without output leaves its block unchanged.
fn replaced(text: &str, mut output_of: impl FnMut(&str, Shown) -> Result<Option<String>>) -> Result<String> {
    let (mut new, mut rest) = (String::new(), text);
    while let Some((at, mark, shown)) = next_mark(rest) {
        let (before, part) = rest.split_at(at + mark.len());
        let (command, part) = part.split_once(MARK_END).context("a comment with a command is not closed")?;
        let no_block = || format!("the comment of {command} is not followed by a block");
        let block = part.strip_prefix(FENCE).with_context(no_block)?;
        let (old, after) = block.split_once(FENCE_END).with_context(no_block)?;
        let content = match output_of(command, shown)? {
            None => old.to_owned(),
            Some(output) if shown == Shown::Transcript => format!("$ {command}\n{}", output.trim_end()),
            Some(output) => output.trim_matches('\n').to_owned(),
        };
        new += &[before, command, MARK_END, FENCE, &content, FENCE_END].concat();
        rest = after;
    }
    Ok(new + rest)
}

/// The position of the next comment with a command, its mark, and the content of its block.
fn next_mark(text: &str) -> Option<(usize, &'static str, Shown)> {
    MARKS
        .into_iter()
        .filter_map(|(mark, shown)| Some((text.find(mark)?, mark, shown)))
        .min_by_key(|(at, ..)| *at)
}

/// Runs a command and returns its output; `None` if this machine lacks the monitor that it compares with. Paths in the
/// workspace become relative.
fn output_of(command: &str, shown: Shown) -> Result<Option<String>> {
    let mut words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    if words.len() < 3 || words[..2] != ["cargo", "xtask"] {
        bail!("{command} is not a command of cargo xtask");
    }
    if let Some(word) = words.iter_mut().find(|word| *word == FIRECRACKER) {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let mut candidates = std::env::split_paths(&folders).map(|folder| folder.join("firecracker"));
        let Some(program) = candidates.find(|program| program.is_file()) else {
            println!("skipped, firecracker not found in PATH: {command}");
            return Ok(None);
        };
        *word = format!("firecracker={}", program.display());
    }
    println!("$ {command}");
    let (mut output, write) = std::io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?);
    child.args(&words[2..]).current_dir(workspace()).stdin(Stdio::null()).stdout(write.try_clone()?);
    if shown == Shown::Transcript {
        child.stderr(write);
    } else {
        drop(write);
    }
    let mut process = child.spawn().with_context(|| format!("cannot start {command}"))?;
    // The command holds the write end of the pipe, which must be closed for the output to end.
    drop(child);
    let mut text = String::new();
    output.read_to_string(&mut text).with_context(|| format!("cannot read the output of {command}"))?;
    let status = process.wait()?;
    ensure!(status.success(), "{command} ended with {status}:\n{text}");
    Ok(Some(with_relative_paths(&text, &workspace())))
}

/// Makes paths below a folder relative to it.
fn with_relative_paths(text: &str, folder: &Path) -> String {
    text.replace(&format!("{}/", folder.display()), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_gets_the_output_of_its_command() {
        let text = "a\n<!-- transcript: cargo xtask x -->\n```text\n$ old\nold\n```\nb\n```text\nc\n```\n\
                    <!-- output: cargo xtask y -->\n```text\nold\n```\n\
                    <!-- output: cargo xtask z -->\n```text\nkept\n```\nd\n";
        let new = replaced(text, |command, _| {
            Ok((!command.ends_with('z')).then(|| format!("\nnew of {command}\n\n")))
        });
        let expected = "a\n<!-- transcript: cargo xtask x -->\n```text\n$ cargo xtask x\n\nnew of cargo xtask x\n```\nb\n\
                        ```text\nc\n```\n<!-- output: cargo xtask y -->\n```text\nnew of cargo xtask y\n```\n\
                        <!-- output: cargo xtask z -->\n```text\nkept\n```\nd\n";
        assert_eq!(new.unwrap(), expected);
        // A command that fails is an error.
        assert!(replaced(text, |_, _| bail!("no")).is_err());
    }

    #[test]
    fn a_comment_without_a_block_is_an_error() {
        for text in
            ["<!-- transcript: x", "<!-- output: x -->\ntext", "<!-- transcript: x -->\n```text\nno end"]
        {
            assert!(replaced(text, |_, _| Ok(Some(String::new()))).is_err(), "{text}");
        }
    }

    #[test]
    fn only_cargo_xtask_commands_are_run() {
        assert!(output_of("rm -rf x", Shown::Output).is_err());
    }

    #[test]
    fn paths_in_the_workspace_become_relative() {
        assert_eq!(
            with_relative_paths("image: /home/me/k/target/images", Path::new("/home/me/k")),
            "image: target/images"
        );
    }
}
