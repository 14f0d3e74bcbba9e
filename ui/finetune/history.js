// Draws the list of runs from props.value. Runs once, when the component loads. Text is inserted with textContent only.

const list = element.querySelector('.history-list');
const template = element.querySelector('.row-template');

/** Draws all rows and keeps the keyboard focus on the same run. */
function draw() {
  const data = props.value || {runs: []};
  element.querySelector('.history').hidden = !data.runs.length;
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
  list.replaceChildren(...data.runs.map(run => createRow(run, run.run === data.selected)));
  if (focused) [...list.querySelectorAll('button')].find(button => button.dataset.run === focused)?.focus();
}

/** Creates the list item of a run. */
function createRow(run, selected) {
  const row = template.content.firstElementChild.cloneNode(true), button = row.querySelector('button');
  const setText = (name, text) => { row.querySelector('.history-' + name).textContent = text; };
  button.dataset.run = run.run;
  button.dataset.state = run.in_use ? 'in-use' : run.state;
  button.setAttribute('aria-pressed', String(selected));
  setText('name', run.name);
  setText('badge', run.badge);
  setText('reward', run.reward);
  setText('result', run.result);
  const times = [run.created, run.duration].map(text => text.replaceAll(' ', '\u00a0'));  // no line break within one
  setText('created', [run.owner, ...times].filter(Boolean).join(' · '));
  const values = run.curve.filter(value => value !== null);
  const min = Math.min(...values), range = Math.max(1e-9, Math.max(...values) - min);
  const points = values.map((value, index) => (index / Math.max(1, values.length - 1) * 100).toFixed(1) + ',' + (22 - (value - min) / range * 20).toFixed(1));
  row.querySelector('polyline').setAttribute('points', points.join(' '));
  return row;
}

element.addEventListener('click', event => {
  const button = event.target.closest('.history-row');
  if (button) trigger('pick', {run: button.dataset.run});
});
watch('value', draw);
draw();
