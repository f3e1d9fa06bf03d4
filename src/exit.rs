//! How a process of ours ends: the exit code, and the reason of a failure.
//!
//! An error type that can end a sub-command implements [`ExitCode`]; `?` then makes a [`Failure`] of it.

use std::process;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything went as ordered.
    Good,
    /// A check failed, or what ran ended by itself.
    Failed,
    /// Usage or configuration.
    Usage,
    /// The kernel or a privilege refused.
    Kernel,
}

impl Exit {
    /// The number the shell sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Kernel => 3,
        }
    }

    /// The exit that an agent named by its number.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Good,
            2 => Self::Usage,
            3 => Self::Kernel,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for process::ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// An error that knows how the process ends because of it.
pub trait ExitCode {
    /// The exit.
    fn exit(&self) -> Exit;
}

/// Why a sub-command ends badly, and with which exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The reason, for a person.
    pub error: anyhow::Error,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }

    /// Usage or configuration.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Usage, error)
    }

    /// The kernel or a privilege refused.
    pub fn kernel(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Kernel, error)
    }

    /// Something ended that should not have.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Failed, error)
    }
}

impl<E: ExitCode + Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.exit(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_numbers() {
        for (exit, code) in [(Exit::Good, 0), (Exit::Failed, 1), (Exit::Usage, 2), (Exit::Kernel, 3)] {
            assert_eq!(exit.code(), code);
            assert_eq!(Exit::from_code(code), exit);
        }
    }
}
