//! A restore is all or nothing: whatever makes it fail, everything around is as it was before, and a restore from the same
//! images succeeds when nothing is in its way.

use ferry_test_bundles::{Engine, Outcome, Place, Surroundings, Workload, processes, surroundings};
use libtest_mimic::{Arguments, Trial};
use std::path::PathBuf;

/// A workload of the host, saved and gone; and what is around.
struct Saved<'place> {
    place: &'place Place,
    engine: Engine,
    workload: Workload<'place>,
    images: PathBuf,
    pids: Vec<i32>,
    before: Surroundings,
}

impl<'place> Saved<'place> {
    fn new(place: &'place Place, name: &str) -> Outcome<Self> {
        let engine = Engine::ferry()?;
        let mut workload = Workload::start(place, name)?;
        workload.ask()?;
        let (images, pids) = (workload.images()?, processes::tree(workload.pid));
        engine.dump(place, workload.pid, &images, &[])?;
        processes::await_end(&pids)?;
        let before = Surroundings::look(place);
        Ok(Self { place, engine, workload, images, pids, before })
    }

    /// A restore that fails, saying these words, and leaves nothing.
    fn fails(&self, options: &[&str], words: &[&str]) -> Outcome {
        match self.engine.restore(self.place, &self.images, options) {
            Ok(()) => return Err("the restore succeeded".to_owned()),
            Err(said) => {
                if let Some(word) = words.iter().find(|word| !said.contains(**word)) {
                    return Err(format!("the restore did not say {word:?}: {said}"));
                }
            }
        }
        self.before.await_again(self.place)
    }

    /// A restore that succeeds; the tree is right from inside. Then it is ended.
    fn succeeds(&self) -> Outcome {
        self.engine.restore(self.place, &self.images, &[])?;
        self.workload.ask()?;
        processes::end_all_below();
        Ok(())
    }
}

/// The number of a task in the middle of the tree belongs to a session of somebody else's, which only the clone finds out.
fn pid_in_use() -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, "prefork")?;
    let number = *saved.pids.last().ok_or("the workload has no children")?;
    let stranger = processes::occupy(number)?;
    let free = std::mem::replace(&mut saved.before, Surroundings::look(&place));
    saved.fails(&[], &["cannot create a task", &number.to_string()])?;
    processes::end_all_below();
    processes::await_end(&[stranger])?;
    saved.before = free;
    saved.before.await_again(&place)?;
    saved.succeeds()?;
    saved.workload.end()
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = |name: &str, run: fn() -> Outcome| {
        Trial::test(name, move || surroundings::isolate().and_then(|()| run()).map_err(Into::into))
    };
    let trials = vec![trial("pid_in_use", pid_in_use)];
    libtest_mimic::run(&arguments, trials).exit();
}
