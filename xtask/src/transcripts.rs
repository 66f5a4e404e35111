//! `cargo xtask transcripts`: runs the commands whose output README and docs show, and writes it there.
//!
//! A transcript is a fenced block behind a comment that names its command: `<!-- transcript: cargo xtask run -->`.

use crate::host::workspace;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MARK: &str = "<!-- transcript: ";
const MARK_END: &str = " -->\n";
const FENCE: &str = "```text\n";
const FENCE_END: &str = "\n```";

/// Replaces every transcript, and says which files changed.
pub(crate) fn run() -> Result<u8> {
    for file in documents()? {
        let text = fs::read_to_string(&file)?;
        let new = replaced(&text, output_of).with_context(|| format!("{}", file.display()))?;
        if new != text {
            fs::write(&file, new).with_context(|| format!("cannot write {}", file.display()))?;
            println!("{}", file.display());
        }
    }
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

/// The text with the output of each transcript's command in its block.
fn replaced(text: &str, mut output_of: impl FnMut(&str) -> Result<String>) -> Result<String> {
    let mut parts = text.split(MARK);
    let mut new = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (command, rest) = part.split_once(MARK_END).context("a transcript's comment has no end")?;
        let block = rest.strip_prefix(FENCE).with_context(|| format!("no block follows {command}"))?;
        let (_, rest) = block.split_once(FENCE_END).with_context(|| format!("no block follows {command}"))?;
        let output = output_of(command)?;
        new +=
            &format!("{MARK}{command}{MARK_END}{FENCE}$ {command}\n{}{FENCE_END}{rest}", output.trim_end());
    }
    Ok(new)
}

/// What a command prints to both of its streams. Paths of this workspace are shown from its root.
fn output_of(command: &str) -> Result<String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let ["cargo", "xtask", arguments @ ..] = &words[..] else {
        bail!("{command} is no command of cargo xtask")
    };
    println!("$ {command}");
    let (mut output, write) = std::io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?);
    child.args(arguments).current_dir(workspace());
    child.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
    let mut process = child.spawn().with_context(|| format!("cannot start {command}"))?;
    // It holds the other end of the pipe, which has to be closed for the output to end.
    drop(child);
    let mut text = String::new();
    output.read_to_string(&mut text).with_context(|| format!("cannot read the output of {command}"))?;
    let status = process.wait()?;
    ensure!(status.success(), "{command} ended with {status}:\n{text}");
    Ok(without(&text, &workspace()))
}

/// A text in which paths below a folder are relative to it.
fn without(text: &str, folder: &Path) -> String {
    text.replace(&format!("{}/", folder.display()), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_gets_the_output_of_its_command() {
        let text = "a\n<!-- transcript: cargo xtask x -->\n```text\n$ old\nold\n```\nb\n```text\nc\n```\n";
        let new = replaced(text, |command| Ok(format!("new of {command}\n\n"))).unwrap();
        let expected = "a\n<!-- transcript: cargo xtask x -->\n```text\n$ cargo xtask x\nnew of cargo xtask x\n```\nb\n```text\nc\n```\n";
        assert_eq!(new, expected);
        // A command that fails leaves everything as it was.
        assert!(replaced(text, |_| bail!("no")).is_err());
    }

    #[test]
    fn a_comment_without_a_block_is_named() {
        for text in
            ["<!-- transcript: x", "<!-- transcript: x -->\ntext", "<!-- transcript: x -->\n```text\nno end"]
        {
            assert!(replaced(text, |_| Ok(String::new())).is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_projects_own_commands_are_run() {
        assert!(output_of("rm -rf x").is_err());
    }

    #[test]
    fn paths_are_shown_from_the_root() {
        assert_eq!(
            without("image: /home/me/k/target/images", Path::new("/home/me/k")),
            "image: target/images"
        );
    }
}
