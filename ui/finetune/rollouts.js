// Draws the rollouts of one step from props.value. Text is inserted with textContent only.

const FOLLOW_MS = 3000;  // between the steps that are shown during training, while the slider is at its end
const find = (name, parent = element) => parent.querySelector('.' + name);
const slider = find('rollouts-step');
let run = null;         // the displayed run
let following = true;   // whether new steps are shown, because the user has not moved to an earlier one
let requested = 0;      // when a step was last requested
let chooseTimer = null; // until the step that the slider shows is requested

/** Formats a number with two decimals; "–" if unknown. */
const format = value => value === null || value === undefined ? '–' : value.toFixed(2);
const fromTemplate = name => find(name + '-template').content.firstElementChild.cloneNode(true);

/** Requests a step, at most once in 150 ms. */
function choose(step) {
  find('rollouts-number').textContent = 'step ' + step;
  requested = Date.now();
  clearTimeout(chooseTimer);
  chooseTimer = setTimeout(() => trigger('choose', {run: run, step: step}), 150);
}

/** Draws the range of steps, and the rollouts if the value has them. A new run starts at its latest step. */
function draw() {
  const data = props.value;
  find('rollouts').hidden = !data;
  if (!data) { run = null; return; }
  slider.max = data.last;
  if (data.run === run && following && data.last > Number(slider.value) && Date.now() - requested > FOLLOW_MS) {
    slider.value = data.last;
    choose(data.last);
  }
  if (data.run !== run) {
    run = data.run;
    following = true;
    find('rollouts-groups').replaceChildren();
    slider.value = data.last;
    if (!data.groups) choose(data.last);
  }
  if (data.groups && Number(slider.value) >= data.step) find('rollouts-groups').replaceChildren(...data.groups.map(drawGroup));
}

/** Creates the photo and the rollouts of a group. */
function drawGroup(group) {
  const node = fromTemplate('group');
  find('group-title', node).textContent = group.title;
  find('group-signal', node).hidden = !group.no_signal;
  node.classList.toggle('no-signal', group.no_signal);
  const before = document.createElement('li'), image = document.createElement('img'), text = document.createElement('p');
  before.className = 'rollout rollout-before';
  image.src = group.before;
  image.alt = group.title + ', unedited';
  text.textContent = 'Before';
  before.append(image, text);
  find('group-pictures', node).append(before, ...group.rollouts.map(rollout => drawRollout(group, rollout)));
  return node;
}

/** Creates the picture, total, advantage and parts of a rollout. */
function drawRollout(group, rollout) {
  const node = fromTemplate('rollout'), image = node.querySelector('img'), advantage = rollout.advantage;
  image.hidden = !rollout.src;
  if (rollout.src) image.src = rollout.src;
  image.alt = group.title + ', after: ' + rollout.text;
  find('rollout-total', node).textContent = format(rollout.total);
  const known = advantage !== null && advantage !== undefined;
  find('rollout-advantage', node).textContent = known ? 'advantage ' + (advantage > 0 ? '+' : '') + format(advantage) : 'no advantage';
  node.dataset.sign = known && Math.abs(advantage) >= 0.005 ? (advantage > 0 ? 'plus' : 'minus') : 'zero';
  find('rollout-scores', node).replaceChildren(...rollout.scores.map(score => {
    const line = document.createElement('span');
    line.textContent = score.name + ' ' + format(score.value);
    return line;
  }));
  find('rollout-text', node).textContent = rollout.text;
  return node;
}

slider.addEventListener('input', () => { following = slider.value === slider.max; choose(Number(slider.value)); });
find('rollouts-latest').addEventListener('click', () => { following = true; slider.value = slider.max; choose(Number(slider.max)); });
watch('value', draw);
draw();
