"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const [task, outcome] = ["task", "outcome"].map((name) => document.getElementById(name));
  const examples = [...document.querySelectorAll(".example")];
  const count = document.getElementById("count");
  const show = () => {
    let shown = 0;
    for (const one of examples) {
      const outcomes = (one.dataset.outcomes || "").split(" ");
      const fits = (!task.value || one.dataset.task === task.value)
        && (!outcome.value || outcomes.includes(outcome.value)
          || (outcome.value === "wrong" && outcomes.includes("forgotten")));
      one.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${examples.length} shown`;
  };
  form.addEventListener("change", show);
  form.hidden = false;
  show();
})();
