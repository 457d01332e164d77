// A slider over the steps of the samples: one step at a time, large. Without it, all are shown.
for (const box of document.querySelectorAll(".samples")) {
  const steps = JSON.parse(box.dataset.steps);
  const slider = document.createElement("input");
  const label = document.createElement("output");
  Object.assign(slider, { type: "range", min: -1, max: steps.length - 1, value: -1 });
  slider.setAttribute("aria-label", "step of the samples");
  const show = () => {
    const step = steps[slider.value];
    label.textContent = step === undefined ? "all steps" : `step ${step.toLocaleString("en")}`;
    box.classList.toggle("single", step !== undefined);
    for (const shot of box.querySelectorAll("[data-step]")) {
      shot.hidden = step !== undefined && Number(shot.dataset.step) !== step;
    }
  };
  slider.addEventListener("input", show);
  box.querySelector(".slider").append(slider, label);
  show();
}
