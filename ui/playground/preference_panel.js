// The panel of choices: draws props.value, a snapshot from preference_panel.py, and lets the visitor choose between pairs.
// Pictures are those of the candidate grid. All text is set with textContent.

const find = className => element.querySelector('.' + className);
const dialog = find('pair-dialog');
const OUTCOME_KEYS = {ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'equal', '=': 'equal', ArrowUp: 'skip', s: 'skip'};
const BUSY_MS = 5000;   // a failed request does not disable the panel for longer
let wanted = false;     // whether the visitor wants to see a pair
let busy = null;

/** Sends an action to the server, unless another one is running. */
function act(action, details) {
  if (busy) return;
  busy = setTimeout(() => { busy = null; }, BUSY_MS);
  trigger('act', {action, keep: find('keep-photo').checked, ...details});
}

/** Draws props.value. */
function draw() {
  clearTimeout(busy);
  busy = null;
  const data = props.value;
  if (!data) return;
  showText(find('panel-lead'), data.lead);
  showText(find('panel-error'), data.error);
  showText(find('pair-error'), data.error);
  showText(find('panel-note'), data.note);
  for (const button of element.querySelectorAll('.needs-choices')) button.disabled = !data.choices;
  for (const button of element.querySelectorAll('.needs-fit')) button.disabled = !data.usable;
  find('dpo').hidden = !data.dpo;
  resetDelete();
  drawWeights(data);
  drawPair(data);
}

/** Draws one row per reward: a bar with its interval, and the weight before. */
function drawWeights(data) {
  const table = find('panel-weights');
  table.hidden = !data.choices;
  table.tBodies[0].replaceChildren(...data.weights.map(weight => {
    const row = document.createElement('tr'), name = document.createElement('th'), bar = document.createElement('td'), text = document.createElement('td');
    name.textContent = weight.name;
    name.scope = 'row';
    bar.className = 'weight-bar';
    for (const [className, left, right] of [['bar-fill', 0, weight.value], ['bar-interval', weight.low, weight.high], ['bar-before', weight.before, weight.before]]) {
      const part = document.createElement('i');
      part.className = className;
      part.style.left = 100 * left + '%';
      part.style.width = 100 * (right - left) + '%';
      bar.append(part);
    }
    text.textContent = weight.text;
    row.append(name, bar, text);
    return row;
  }));
}

/** Shows the next pair, or closes the dialog if there is none. */
function drawPair(data) {
  const pair = data.pair;
  if (!pair || !wanted) { if (dialog.open) dialog.close(); return; }
  const [left, right] = element.querySelectorAll('.pair-side img');
  const source = key => document.querySelector('#candidates .card[data-key="' + CSS.escape(key) + '"] .card-after')?.getAttribute('src');
  if (!source(pair.left) || !source(pair.right)) { dialog.close(); return; }
  left.src = source(pair.left);
  right.src = source(pair.right);
  showText(find('pair-progress'), data.lead);
  find('pair-undo').disabled = !data.choices;
  if (!dialog.open) dialog.showModal();
}

function choose(outcome) {
  const pair = props.value.pair;
  if (pair) act('choose', {...pair, outcome});
}

find('open-pairs').addEventListener('click', () => { wanted = true; act('open'); });
for (const button of element.querySelectorAll('[data-outcome]')) button.addEventListener('click', () => choose(button.dataset.outcome));
for (const button of element.querySelectorAll('[data-action]')) button.addEventListener('click', () => act(button.dataset.action));
find('pair-undo').addEventListener('click', () => act('undo'));
find('pair-close').addEventListener('click', () => dialog.close());
find('download').addEventListener('click', () => trigger('download', {}));
find('retrain').addEventListener('click', () => trigger('retrain', {}));
find('dpo').addEventListener('click', () => trigger('dpo', {}));
dialog.addEventListener('close', () => { wanted = false; find('open-pairs').focus(); });
dialog.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const outcome = OUTCOME_KEYS[event.key] || OUTCOME_KEYS[event.key.toLowerCase()];
  if (outcome) choose(outcome);
  else if (event.key.toLowerCase() === 'u') act('undo');
  else return;
  event.preventDefault();
});

/** Asks once before the choices are deleted. */
function resetDelete() { find('delete').textContent = 'Delete choices'; find('delete').classList.remove('confirm'); }
find('delete').addEventListener('click', () => {
  if (find('delete').classList.contains('confirm')) return act('delete');
  find('delete').classList.add('confirm');
  find('delete').textContent = 'Delete ' + props.value.choices + ' for good?';
  setTimeout(resetDelete, 5000);
});

watch('value', draw);
draw();
