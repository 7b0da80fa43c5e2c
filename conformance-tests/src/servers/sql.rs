//! What the SQL servers have in common: whom they let in, and how their programs are run besides.
//!
//! Nothing here knows a dialect or a protocol.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

/// The database that is there from the beginning, and its owner.
pub(super) const NAME: &str = "sessionkit";

/// The password of the owner. It protects nothing: the server is alone on its port, and gone with its test.
pub(super) const PASSWORD: &str = "conformance";

/// Returns `scheme://user:password@address/sessionkit`, with what is not plain in user and password escaped.
pub(super) fn url(scheme: &str, user: &str, password: &str, address: SocketAddr) -> String {
    format!("{scheme}://{}:{}@{address}/{NAME}", escaped(user), escaped(password))
}

fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// Runs a program that reads the file, and waits for its end.
///
/// # Errors
/// `Other` with its words if it fails.
pub(super) fn run(command: &mut Command, input: File) -> io::Result<()> {
    let output = command.env("LC_ALL", "C").stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let (words, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let program = command.get_program().display();
    Err(io::Error::other(format!("{program} failed ({}):\n{words}{errors}", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_of_any_characters_can_stand_in_a_url() {
        let url = url("postgres", "alice", "p@ss:/?#%ä", SocketAddr::from(([127, 0, 0, 1], 5432)));
        assert_eq!(url, "postgres://alice:p%40ss%3A%2F%3F%23%25%C3%A4@127.0.0.1:5432/sessionkit");
    }
}
