//! Text to trees that know their lines.
//!
//! YAML 1.2 and with it JSON. Anchors are refused, for a few lines of them can stand for more than memory holds, and no
//! tool writes policies with them; so are tags, and nesting beyond [`MAX_DEPTH`].

use std::collections::BTreeMap;

use saphyr::Scalar;
use saphyr_parser::{Event, Parser, Span};
use serde_json::{Map, Number, Value};

/// Deepest nesting.
pub const MAX_DEPTH: usize = 64;

/// Lines by path, as `spec.ingress[0].from`; the document's own line has the empty path.
pub type Lines = BTreeMap<String, u32>;

/// One document.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// What it says.
    pub value: Value,
    /// Where it says it.
    pub lines: Lines,
}

/// A text that is no YAML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Line, from 1.
    pub line: u32,
    /// Path of the field, as far as it is known.
    pub path: String,
    /// Why.
    pub reason: String,
}

/// All documents of a text, empty ones left out.
///
/// # Errors
///
/// Where the text is no YAML, or more of it than is read here.
pub fn documents(text: &str) -> Result<Vec<Document>, Refusal> {
    let mut reader = Reader { parser: Parser::new_from_str(text), lines: Lines::new() };
    let mut documents = Vec::new();
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => return Ok(documents),
            Event::DocumentStart(_) => {
                let (event, span) = reader.next()?;
                reader.lines.clear();
                let value = reader.node(event, span, "", 0)?;
                if !value.is_null() {
                    documents.push(Document { value, lines: std::mem::take(&mut reader.lines) });
                }
            }
            Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
            _ => return Err(refuse(span, "", "this is no document")),
        }
    }
}

/// The line of a path, or of the nearest thing around it that has one.
pub fn line_of(lines: &Lines, path: &str) -> u32 {
    let mut path = path;
    loop {
        if let Some(line) = lines.get(path) {
            return *line;
        }
        match path.rfind(['.', '[']) {
            Some(at) => path = &path[..at],
            None => return lines.get("").copied().unwrap_or(1),
        }
    }
}

struct Reader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    lines: Lines,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), Refusal> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => {
                let line = error.marker().line() as u32;
                Err(Refusal { line, path: String::new(), reason: format!("this is no YAML: {}", error.info()) })
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, path: &str, depth: usize) -> Result<Value, Refusal> {
        if depth > MAX_DEPTH {
            return Err(refuse(span, path, "nested too deep"));
        }
        self.lines.insert(path.to_owned(), span.start.line() as u32);
        match event {
            Event::Scalar(text, style, _, tag) => {
                let scalar = Scalar::parse_from_cow_and_metadata(text, style, tag.as_ref());
                scalar.and_then(scalar_value).ok_or_else(|| refuse(span, path, "no value that JSON has"))
            }
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    let (event, span) = self.next()?;
                    if event == Event::SequenceEnd {
                        return Ok(Value::Array(items));
                    }
                    let path = format!("{path}[{}]", items.len());
                    items.push(self.node(event, span, &path, depth + 1)?);
                }
            }
            Event::MappingStart(..) => {
                let mut fields = Map::new();
                loop {
                    let (event, span) = self.next()?;
                    let key = match event {
                        Event::MappingEnd => return Ok(Value::Object(fields)),
                        Event::Scalar(key, ..) => key.into_owned(),
                        _ => return Err(refuse(span, path, "a key must be a word")),
                    };
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    if fields.contains_key(&key) {
                        return Err(refuse(span, &path, "the field is there twice"));
                    }
                    let (event, value_span) = self.next()?;
                    let value = self.node(event, value_span, &path, depth + 1)?;
                    // A block is where its key is.
                    self.lines.insert(path, span.start.line() as u32);
                    fields.insert(key, value);
                }
            }
            Event::Alias(_) => Err(refuse(span, path, "anchors and aliases are not taken: write it out")),
            _ => Err(refuse(span, path, "a value is missing")),
        }
    }
}

fn scalar_value(scalar: Scalar<'_>) -> Option<Value> {
    Some(match scalar {
        Scalar::Null => Value::Null,
        Scalar::Boolean(yes) => Value::Bool(yes),
        Scalar::Integer(number) => Value::Number(number.into()),
        Scalar::FloatingPoint(number) => Value::Number(Number::from_f64(number.into_inner())?),
        Scalar::String(text) => Value::String(text.into_owned()),
    })
}

fn refuse(span: Span, path: &str, reason: &str) -> Refusal {
    Refusal { line: span.start.line() as u32, path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_lines() {
        let text = "# head\nkind: A\nspec:\n  ports:\n  - port: 80\n  - {port: 81}\n---\nkind: B\n---\n";
        let read = documents(text).unwrap();
        assert_eq!(read.len(), 2);
        let lines = &read[0].lines;
        let at = |path: &str| line_of(lines, path);
        assert_eq!(
            [at(""), at("kind"), at("spec.ports"), at("spec.ports[0]"), at("spec.ports[1].port")],
            [2, 2, 4, 5, 6]
        );
        assert_eq!(at("spec.ports[1].nothing.here"), 6, "the nearest thing that has a line");
        assert_eq!(line_of(&read[1].lines, "kind"), 8);
        assert_eq!(read[0].value["spec"]["ports"][1]["port"], 81);
        assert_eq!(documents("{\"a\": [1, {\"b\": null}]}").unwrap()[0].value["a"][0], 1);
    }

    #[test]
    fn what_is_refused_has_a_line() {
        let refused = |text: &str| documents(text).unwrap_err();
        assert_eq!(refused("a: 1\nb: [1,\n").line, 3);
        assert_eq!(
            refused("a: 1\nb:\n  a: 1\n  a: 2\n"),
            Refusal { line: 4, path: "b.a".into(), reason: "the field is there twice".into() }
        );
        let alias = refused("a: &x [1]\nb: *x\n");
        assert_eq!((alias.line, alias.reason.contains("anchors")), (2, true));
        let deep = format!("a: {}{}", "[".repeat(MAX_DEPTH + 1), "]".repeat(MAX_DEPTH + 1));
        assert_eq!(refused(&deep).reason, "nested too deep");
        assert_eq!(refused(&"[".repeat(100_000)).line, 1);
    }
}
