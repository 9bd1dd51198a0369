//! Why a command failed, as one sentence for people, and the status it exits with.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

/// A failed command.
///
/// Any error converts into one; its chain of sources is joined with colons, each cause once.
#[derive(Debug)]
pub struct Failure {
    sentence: String,
    status: u8,
    errno: Option<i32>,
}

impl Failure {
    /// A failure with exit status 1, which is runc's for every error of its own.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), status: 1, errno: None }
    }

    /// The same failure with another exit status.
    #[cfg_attr(not(feature = "oci"), allow(dead_code, reason = "CRIU's commands exit with 1 alone"))]
    pub fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }

    /// The same failure with an error number for programs (errno(3)).
    pub fn with_errno(self, errno: i32) -> Self {
        Self { errno: Some(errno), ..self }
    }

    /// The error number for programs, if there is one.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// The status that the command exits with.
    pub fn status(&self) -> ExitCode {
        ExitCode::from(self.status)
    }

    /// The same failure, told as the cause of `what` having failed.
    pub fn context(self, what: impl fmt::Display) -> Self {
        Self { sentence: format!("{what}: {}", self.sentence), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.sentence)
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(sentence_of(&error))
    }
}

/// The message of `error` and of its sources, without a cause that the text before already tells.
pub fn sentence_of(error: &dyn Error) -> String {
    let mut sentence = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !sentence.contains(&text) {
            sentence.push_str(": ");
            sentence.push_str(&text);
        }
        source = cause.source();
    }
    // A log line and a terminal line both hold exactly one sentence.
    sentence.trim_end().replace('\n', "; ")
}

/// What a command ends with.
pub type Outcome = Result<ExitCode, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the log")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the log: {0}")]
    struct Told(#[source] std::io::Error);

    #[test]
    fn tells_each_cause_once() {
        let missing = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such thing");
        assert_eq!(Failure::from(Outer(missing())).to_string(), "cannot open the log: no such thing");
        assert_eq!(Failure::from(Told(missing())).to_string(), "cannot open the log: no such thing");
    }
}
