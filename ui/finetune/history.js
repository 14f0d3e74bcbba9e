// Draws the list of runs from props.value; runs once, when the list loads. All text goes in with textContent.

const list = element.querySelector('.history-list');
const template = element.querySelector('.row-template');

function draw() {
  const data = props.value || {runs: []};
  element.querySelector('.history').hidden = !data.runs.length;
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
  list.replaceChildren(...data.runs.map(run => row(run, run.run === data.chosen)));
  if (focused) [...list.querySelectorAll('button')].find(button => button.dataset.run === focused)?.focus();
}

function row(run, chosen) {
  const part = template.content.firstElementChild.cloneNode(true), button = part.querySelector('button');
  const put = (name, words) => { part.querySelector('.history-' + name).textContent = words; };
  button.dataset.run = run.run;
  button.dataset.state = run.used ? 'used' : run.state;
  button.setAttribute('aria-pressed', String(chosen));
  put('name', run.name);
  put('badge', run.badge);
  put('reward', run.reward);
  put('result', run.result);
  put('when', [run.when, run.duration].filter(Boolean).join(' · '));
  const known = run.curve.filter(value => value !== null);
  const low = Math.min(...known), span = Math.max(1e-9, Math.max(...known) - low);
  const points = known.map((value, place) => (place / Math.max(1, known.length - 1) * 100).toFixed(1) + ',' + (22 - (value - low) / span * 20).toFixed(1));
  part.querySelector('polyline').setAttribute('points', points.join(' '));
  return part;
}

element.addEventListener('click', event => {
  const button = event.target.closest('.history-row');
  if (button) trigger('pick', {run: button.dataset.run});
});
watch('value', draw);
draw();
