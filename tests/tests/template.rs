//! `kindling template` and `kindling run --template`: copies of a guest that was saved after a set-up.

use tests::user::User;
use tests::{Outcome, run, testbed};

/// A user with a template of busybox.
struct Owner(User);

impl Owner {
    /// A user with the template `t`, prepared by a shell script.
    fn with_template(options: &[&str], script: &str) -> Self {
        let this = Self(User::new());
        let mut command = this.0.command("template");
        command.args(["create", "--memory", "64"]).args(options).arg("t").arg(testbed("busybox.erofs"));
        let outcome = run(command.args(["sh", "-c", script]));
        assert_eq!(outcome.expect_status(0).stdout.lines().last(), Some("t"), "{outcome}");
        this
    }

    /// Runs a shell script in a copy.
    fn copy(&self, options: &[&str], script: &str) -> Outcome {
        run(self.0.command("run").args(["--template", "t"]).args(options).args(["sh", "-c", script]))
    }
}

#[test]
fn a_copy_continues_where_the_template_was_saved() {
    let owner = Owner::with_template(&[], "echo prepared >/srv-file; sleep 1000 & echo output");
    let outcome = owner.copy(&["-e", "A=b"], "cat /srv-file; pidof sleep | wc -w; echo $A; exit 3");
    assert_eq!(outcome.expect_status(3).stdout, "prepared\n1\nb\n", "{outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
    assert!(owner.0.has_no_guests());
}
