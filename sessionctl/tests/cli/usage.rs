//! Wrong words, unknown stores, secrets in them, and a reader who goes away.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::{Answer, Store, new_id, run, sessionctl};

const COMMANDS: [&str; 14] =
    ["lab", "check", "hammer", "get", "set", "incr", "hold", "rm", "ls", "locks", "unlock", "gc", "bench", "completions"];

#[test]
fn every_command_explains_itself_with_an_example() {
    let help = run(&["--help"]);
    for command in COMMANDS {
        assert!(help.text().contains(&format!("\n  {command} ")), "{command}");
        let help = run(&[command, "--help"]);
        let example = help.text().rsplit_once("Example").unwrap_or_else(|| panic!("{command}")).1;
        assert!(example.contains(&format!("sessionctl {command} ")), "{command}");
    }
    assert!(!help.text().contains("__worker"));
}

#[test]
fn wrong_words_end_with_two_and_leave_stdout_empty() {
    let id = new_id();
    for words in [
        &["frobnicate"][..],
        &["get"],
        &["gc", "memory://", "--limit", "0"],
        &["incr", "memory://", &id, "n", "--times", "0"],
        &["incr", "memory://", &id, "n", "--hold", "5"],
        &["hammer", "memory://", "--stall", "101"],
        &["hammer", "memory://", "--ops", "5", "--seconds", "5"],
        &["hammer", "memory://", "--access", "sometimes"],
        &["completions", "cobol"],
        &["lab", "memory://"],
        &["lab", "--port", "70000"],
        &["set", "memory://", &id, "k"],
    ] {
        let answer = run(words);
        assert_eq!((answer.status, answer.stdout.as_str()), (2, ""), "{words:?} {answer:?}");
        assert!(!answer.stderr.is_empty());
    }
}

#[test]
fn a_store_that_cannot_be_meant_ends_with_two() {
    let id = new_id();
    run(&["get", "ftp://h/0", &id]).refused(2, "unknown scheme ftp:// (accepted: file://, memcache://, memory://, redis://");
    run(&["ls", "nonsense"]).refused(2, "://");
    run(&["gc", "memory://?wiat=1s"]).refused(2, "did you mean wait?");
    run(&["incr", "memory://?ttl=5", &id, "n"]).refused(2, "20m");
    run(&["get", "memory://", "short", "--json"]).refused(2, "5 characters");
    run(&["set", "memory://", &id, "k", "Ada"]).refused(2, "not JSON");
}

#[test]
fn neither_a_password_nor_an_id_nor_a_control_character_comes_back() {
    let id = new_id();
    for words in [
        &["gc", "ftp://me:hunter2@h/0"][..],
        &["gc", "memory://", "redis://me:hunter2@h/0"],
        &["gc", "--frobnicate=redis://me:hunter2@h/0"],
        &["get", "redis://me:hunter2@h:99999/0", &id],
        &["gc", "memory://", "\u{1b}]0;hunter2@\u{7}\u{9b}31m"],
    ] {
        let Answer { status, stdout, stderr } = run(words);
        assert_eq!((status, stdout.as_str()), (2, ""), "{words:?} {stderr}");
        assert!(!stderr.contains("me:hunter2") && !stderr.contains(&id), "{stderr}");
        assert!(!stderr.contains(|c: char| c.is_control() && c != '\n'), "{stderr:?}");
    }
    let answer = run(&["get", "memory://", "\u{1b}[2Jnot-an-id-but-perhaps-nearly"]);
    answer.refused(2, "ID is not a session id");
    assert!(!answer.stderr.contains("nearly"));
}

#[test]
fn completions_are_a_script_or_an_object_that_holds_it() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(run(&["completions", shell]).text().contains("sessionctl"), "{shell}");
    }
    let object = run(&["completions", "bash", "--json"]).object();
    assert_eq!(object["shell"], "bash");
    assert!(object["script"].as_str().unwrap().contains("_sessionctl"));
}

#[test]
fn a_reader_who_goes_away_is_no_error() {
    let store = Store::new();
    for _ in 0..3 {
        store.run("set", &[&new_id(), "n", "1"]).text();
    }
    // The listing is written line by line: after the first line nobody listens any more.
    let mut child =
        sessionctl(&["ls", &store.dsn(""), "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::with_capacity(1, child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    drop(stdout);
    let answer = Answer::of(child.wait_with_output().unwrap());
    assert_eq!((answer.status, answer.stderr.as_str()), (0, ""));
    // And one who was never there.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let answer = sessionctl(&["--help"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stderr), "");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let answer = sessionctl(&["completions", "bash"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((answer.status.code(), String::from_utf8_lossy(&answer.stderr).as_ref()), (Some(0), ""));
}
