//! Reads the Kconfig files of a kernel and collects their symbols.

use std::sync::Arc;

use super::expr::Expr;
use super::lexer::{Lexer, Line, Variables};
use super::parser::Cursor;
use super::source::path_in_tree;
use super::{
    Choice, Condition, Conditional, Conditions, Definition, Kconfig, KconfigError, Kind, Location,
    MAX_KCONFIG_BYTES, Prompt, Selection, Source,
};

/// Maximum depth of sourced files, which also ends cycles. The kernel's files are nested six deep.
const MAX_SOURCE_DEPTH: usize = 32;

/// Maximum number of sourced files; an x86 kernel has 1,600. Without it, a few files that each source the next one
/// twice would be read exponentially often.
const MAX_FILES: usize = 10_000;

/// Maximum nesting of menus, choices and ifs across files.
const MAX_BLOCKS: usize = 128;

/// Variables that the kernel's makefiles set for an x86 build.
const VARIABLES: [(&str, &str); 3] = [("ARCH", "x86"), ("SRCARCH", "x86"), ("srctree", ".")];

pub(super) fn read(source: &dyn Source) -> Result<Kconfig, KconfigError> {
    let mut reader = Reader {
        source,
        variables: Variables::new(&VARIABLES),
        kconfig: Kconfig::default(),
        blocks: Vec::new(),
        entry: Entry::None,
        files: 0,
    };
    reader.file("Kconfig", None, 0)?;
    Ok(reader.kconfig)
}

/// An open menu, choice or if.
#[derive(Debug)]
struct Block {
    kind: BlockKind,
    at: Location,
    /// Dependencies that this block adds to its content.
    depends: Conditions,
    /// Conditions that this block adds to the prompts of its content.
    visible: Conditions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockKind {
    If,
    Menu,
    Choice(usize),
}

impl BlockKind {
    fn name(self) -> &'static str {
        match self {
            Self::If => "if",
            Self::Menu => "menu",
            Self::Choice(_) => "choice",
        }
    }
}

/// The entry to which the following properties belong.
#[derive(Debug)]
enum Entry {
    /// None: a property is misplaced.
    None,
    /// The innermost open block.
    Block,
    /// A comment, which is discarded.
    Comment,
    /// A symbol, whose definition is added when the entry ends.
    Symbol(Box<OpenSymbol>),
}

#[derive(Debug)]
struct OpenSymbol {
    name: String,
    definition: Definition,
    /// The prompt conditions of the enclosing blocks.
    visible: Conditions,
    /// Selected and implied symbols. They are updated when all dependencies of the entry are known.
    selects: Vec<Select>,
}

#[derive(Debug)]
struct Select {
    target: String,
    weak: bool,
    condition: Option<Arc<Condition>>,
    at: Location,
}

struct Reader<'a> {
    source: &'a dyn Source,
    variables: Variables,
    kconfig: Kconfig,
    blocks: Vec<Block>,
    entry: Entry,
    files: usize,
}

impl Reader<'_> {
    /// Reads one file and the files that it sources.
    fn file(&mut self, file: &str, from: Option<&Location>, depth: usize) -> Result<(), KconfigError> {
        let bytes = self.source.read(file).map_err(|source| KconfigError::Read {
            file: file.to_owned(),
            from: from.cloned(),
            source,
        })?;
        if bytes.len() > MAX_KCONFIG_BYTES {
            return Err(KconfigError::TooBig { file: file.to_owned() });
        }
        let text =
            std::str::from_utf8(&bytes).map_err(|_| KconfigError::NotText { file: file.to_owned() })?;

        let outer_blocks = self.blocks.len();
        let mut lexer = Lexer::new(file.into(), text);
        while let Some((at, line)) = lexer.next_line(&mut self.variables)? {
            let Line::Statement(tokens) = line else { continue };
            let mut cursor = Cursor::new(&at, &tokens);
            let keyword = cursor.word("a statement")?;
            match keyword {
                "source" | "rsource" => self.source(keyword, cursor, &at, depth)?,
                "help" => self.help(lexer.help(), &at)?,
                "endif" | "endmenu" | "endchoice" => self.close(keyword, outer_blocks, &at)?,
                _ => self.statement(keyword, cursor, &at)?,
            }
        }
        self.finish_entry();
        match self.blocks.get(outer_blocks) {
            None => Ok(()),
            Some(Block { kind, at, .. }) => {
                Err(KconfigError::NotClosed { at: at.clone(), block: kind.name() })
            }
        }
    }

    fn source(
        &mut self,
        keyword: &str,
        mut cursor: Cursor<'_>,
        at: &Location,
        depth: usize,
    ) -> Result<(), KconfigError> {
        let name = cursor.path()?;
        cursor.end()?;
        self.finish_entry();
        // rsource is relative to the current file, source to the top of the tree.
        let folder = match keyword {
            "rsource" => at.file.rsplit_once('/').map_or("", |(folder, _)| folder),
            _ => "",
        };
        let Some(file) = path_in_tree(folder, name) else {
            return Err(KconfigError::OutsideTree { at: at.clone(), file: name.to_owned() });
        };
        if depth >= MAX_SOURCE_DEPTH {
            let limit = MAX_SOURCE_DEPTH;
            return Err(KconfigError::TooDeep { at: at.clone(), file, limit });
        }
        self.files += 1;
        if self.files > MAX_FILES {
            return Err(KconfigError::TooManyFiles { at: at.clone(), limit: MAX_FILES });
        }
        self.file(&file, Some(at), depth + 1)
    }

    /// Handles a statement that opens an entry or a block. All others are properties.
    fn statement(
        &mut self,
        keyword: &str,
        mut cursor: Cursor<'_>,
        at: &Location,
    ) -> Result<(), KconfigError> {
        match keyword {
            "config" | "menuconfig" => {
                let name = cursor.word("a symbol")?;
                self.open_symbol(name, at);
            }
            "mainmenu" | "comment" => {
                cursor.string("a title in quotes")?;
                self.finish_entry();
                self.entry = Entry::Comment;
            }
            "menu" => {
                cursor.string("a title in quotes")?;
                self.open_block(BlockKind::Menu, at, Vec::new())?;
            }
            "if" => {
                let condition = condition(cursor.expr()?, at);
                self.open_block(BlockKind::If, at, vec![condition])?;
                self.entry = Entry::None;
            }
            "choice" => {
                let choice = Choice { at: at.clone(), prompt: String::new(), members: Vec::new() };
                let index = self.kconfig.choices.len();
                self.open_block(BlockKind::Choice(index), at, Vec::new())?;
                self.kconfig.choices.push(choice);
                if !cursor.is_at_end() {
                    // Old kernels allowed a name for a choice, which was not used.
                    cursor.word("nothing more")?;
                }
            }
            _ => return self.property(keyword, cursor, at),
        }
        cursor.end()
    }

    fn open_block(
        &mut self,
        kind: BlockKind,
        at: &Location,
        depends: Conditions,
    ) -> Result<(), KconfigError> {
        self.finish_entry();
        if self.blocks.len() >= MAX_BLOCKS {
            return Err(KconfigError::TooManyBlocks { at: at.clone(), limit: MAX_BLOCKS });
        }
        self.blocks.push(Block { kind, at: at.clone(), depends, visible: Vec::new() });
        self.entry = Entry::Block;
        Ok(())
    }

    /// Closes the innermost block, which must have this kind and be in the same file.
    fn close(&mut self, keyword: &str, outer: usize, at: &Location) -> Result<(), KconfigError> {
        self.finish_entry();
        let inside = self.blocks.get(outer..).and_then(<[Block]>::last);
        if inside.is_none_or(|block| keyword.strip_prefix("end") != Some(block.kind.name())) {
            let word = keyword.to_owned();
            return Err(KconfigError::NothingToClose { at: at.clone(), word });
        }
        self.blocks.pop();
        Ok(())
    }

    fn open_symbol(&mut self, name: &str, at: &Location) {
        self.finish_entry();
        let choice = self.blocks.iter().rev().find_map(|block| match block.kind {
            BlockKind::Choice(index) => Some(index),
            _ => None,
        });
        if let Some(choice) = choice.and_then(|index| self.kconfig.choices.get_mut(index)) {
            choice.members.push(name.to_owned());
        }
        let all =
            |part: fn(&Block) -> &Conditions| self.blocks.iter().flat_map(part).map(Arc::clone).collect();
        let definition = Definition {
            at: at.clone(),
            kind: None,
            prompt: None,
            depends: all(|block| &block.depends),
            defaults: Vec::new(),
            ranges: Vec::new(),
            help: None,
            choice,
        };
        let visible = all(|block| &block.visible);
        let name = name.to_owned();
        let open = OpenSymbol { name, definition, visible, selects: Vec::new() };
        self.entry = Entry::Symbol(Box::new(open));
    }

    /// Adds the definition of the entry that ends here, and its selections to the selected symbols.
    fn finish_entry(&mut self) {
        let Entry::Symbol(open) = std::mem::replace(&mut self.entry, Entry::None) else { return };
        let OpenSymbol { name, mut definition, visible, selects } = *open;
        if let Some(prompt) = &mut definition.prompt {
            prompt.when.extend(visible);
        }
        for select in selects {
            let when = definition.depends.iter().cloned().chain(select.condition).collect();
            let selection = Selection { by: name.clone(), when, at: select.at };
            let target = self.kconfig.symbols.entry(select.target).or_default();
            if select.weak {
                target.implied_by.push(selection);
            } else {
                target.selected_by.push(selection);
            }
        }
        self.kconfig.symbols.entry(name).or_default().definitions.push(definition);
    }

    fn help(&mut self, text: String, at: &Location) -> Result<(), KconfigError> {
        match &mut self.entry {
            Entry::Symbol(open) => open.definition.help = Some(text),
            Entry::Block => {}
            Entry::None | Entry::Comment => return Err(misplaced("help", at)),
        }
        Ok(())
    }

    fn property(&mut self, keyword: &str, cursor: Cursor<'_>, at: &Location) -> Result<(), KconfigError> {
        match &mut self.entry {
            Entry::Symbol(open) => open.property(keyword, cursor, at),
            Entry::Block => match self.blocks.last_mut() {
                Some(block) => block.property(keyword, cursor, at, &mut self.kconfig.choices),
                None => Err(misplaced(keyword, at)),
            },
            // The dependencies of a comment affect only the comment.
            Entry::Comment if keyword == "depends" => Ok(()),
            Entry::None | Entry::Comment if is_property(keyword) => Err(misplaced(keyword, at)),
            Entry::None | Entry::Comment => Err(unknown(keyword, at)),
        }
    }
}

impl Block {
    /// Handles a property of a menu or choice.
    fn property(
        &mut self,
        keyword: &str,
        mut cursor: Cursor<'_>,
        at: &Location,
        choices: &mut [Choice],
    ) -> Result<(), KconfigError> {
        match (keyword, self.kind) {
            ("depends", _) => self.depends.push(depends_on(cursor, at)?),
            ("visible", BlockKind::Menu) => {
                if let Some(expr) = cursor.condition()? {
                    self.visible.push(condition(expr, at));
                }
            }
            ("bool" | "tristate" | "prompt", BlockKind::Choice(index)) => {
                if cursor.is_at_end() {
                    return Ok(());
                }
                let text = cursor.string("a prompt in quotes")?;
                // An `if` here hides the choice from menus, but a .config may still name a member.
                cursor.condition()?;
                if let Some(choice) = choices.get_mut(index) {
                    text.clone_into(&mut choice.prompt);
                }
            }
            // The default is irrelevant: the resulting .config shows the selected member.
            ("default" | "optional", BlockKind::Choice(_)) => {}
            _ if is_property(keyword) => return Err(misplaced(keyword, at)),
            _ => return Err(unknown(keyword, at)),
        }
        Ok(())
    }
}

impl OpenSymbol {
    /// Handles a property of a symbol.
    fn property(&mut self, keyword: &str, mut cursor: Cursor<'_>, at: &Location) -> Result<(), KconfigError> {
        match keyword {
            "bool" | "tristate" | "int" | "hex" | "string" => {
                self.definition.kind = kind(keyword);
                if !cursor.is_at_end() {
                    self.prompt(cursor, at)?;
                }
            }
            "prompt" => self.prompt(cursor, at)?,
            "default" | "def_bool" | "def_tristate" => {
                self.definition.kind = kind(keyword).or(self.definition.kind);
                let value = cursor.expr()?;
                let when = cursor.condition()?;
                self.definition.defaults.push(Conditional { value, when });
            }
            "depends" => self.definition.depends.push(depends_on(cursor, at)?),
            "select" | "imply" => {
                let target = cursor.word("a symbol")?.to_owned();
                let condition = cursor.condition()?.map(|expr| condition(expr, at));
                let weak = keyword == "imply";
                self.selects.push(Select { target, weak, condition, at: at.clone() });
            }
            "range" => {
                let value = (cursor.term()?, cursor.term()?);
                let when = cursor.condition()?;
                self.definition.ranges.push(Conditional { value, when });
            }
            // None of these changes the possible values of a symbol: `modules` marks MODULES, `transitional` a symbol
            // that only keeps the value of an old name.
            "modules" | "transitional" | "option" => {}
            _ => return Err(unknown(keyword, at)),
        }
        Ok(())
    }

    fn prompt(&mut self, mut cursor: Cursor<'_>, at: &Location) -> Result<(), KconfigError> {
        let text = cursor.string("a prompt in quotes")?.to_owned();
        let when = cursor.condition()?.map(|expr| condition(expr, at)).into_iter().collect();
        self.definition.prompt = Some(Prompt { text, when });
        Ok(())
    }
}

fn depends_on(mut cursor: Cursor<'_>, at: &Location) -> Result<Arc<Condition>, KconfigError> {
    cursor.keyword("on", "\"on\"")?;
    let expr = cursor.expr()?;
    cursor.end()?;
    Ok(condition(expr, at))
}

fn condition(expr: Expr, at: &Location) -> Arc<Condition> {
    Arc::new(Condition { expr, at: at.clone() })
}

/// The type that a keyword declares.
fn kind(keyword: &str) -> Option<Kind> {
    Some(match keyword {
        "bool" | "def_bool" => Kind::Bool,
        "tristate" | "def_tristate" => Kind::Tristate,
        "int" => Kind::Int,
        "hex" => Kind::Hex,
        "string" => Kind::Text,
        _ => return None,
    })
}

/// Whether the keyword is a property, for a better message.
fn is_property(keyword: &str) -> bool {
    let other = [
        "prompt",
        "default",
        "depends",
        "select",
        "imply",
        "range",
        "visible",
        "modules",
        "transitional",
        "option",
        "optional",
    ];
    kind(keyword).is_some() || other.contains(&keyword)
}

fn misplaced(word: &str, at: &Location) -> KconfigError {
    KconfigError::Misplaced { at: at.clone(), word: word.to_owned() }
}

fn unknown(word: &str, at: &Location) -> KconfigError {
    KconfigError::UnknownStatement { at: at.clone(), word: word.to_owned() }
}
