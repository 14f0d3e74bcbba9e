// Draws an evaluation from props.value. Text is inserted with textContent only.

const CONFIRM_MS = 5000;  // how long Delete asks for confirmation
const SVG = 'http://www.w3.org/2000/svg';
const find = (name, parent = element) => parent.querySelector('.' + name);
const buttons = [...element.querySelectorAll('[data-action]')];
let shown = null;                        // id of the evaluation that is drawn
let sort = {key: 'reward', down: true};  // column of the leaderboard
let axis = 'latency', confirmTimer = null;

const isKnown = value => value !== null && value !== undefined;
const number = (value, digits) => !isKnown(value) ? '–' : value.toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits});
const dollars = value => !isKnown(value) ? '–' : value === 0 ? '$0' : '$' + Number(value.toPrecision(2)).toLocaleString('en', {maximumFractionDigits: 8});
const percent = value => Math.round(100 * value) + ' %';
const signed = value => (value > 0 ? '+' : value < 0 ? '−' : '±') + Math.abs(value).toFixed(3);

/** Columns of the leaderboard: key, title, value to sort by, text, and a second line. */
function columnsOf(data) {
  const interval = (value, format) => isKnown(value && value.mean) ? format(value.low) + ' to ' + format(value.high) : '';
  const three = value => value.toFixed(3);
  const scored = data.rewards.length ? [
    {key: 'reward', title: 'Reward', value: row => row.reward.mean, text: row => number(row.reward.mean, 3), more: row => interval(row.reward, three)},
    {key: 'mean', title: 'Mean of all', value: row => row.mean_candidate, text: row => number(row.mean_candidate, 3)},
    ...data.rewards.map(name => ({key: 'part-' + name, title: name, value: row => row.parts[name], text: row => number(row.parts[name], 3)})),
    {key: 'wins', title: 'Wins', value: row => row.wins && row.wins.mean, text: row => row.wins && isKnown(row.wins.mean) ? percent(row.wins.mean) : '–', more: row => interval(row.wins, percent)},
  ] : [];
  const earlier = data.compare && data.rewards.length ? [{key: 'earlier', title: 'Change', value: row => row.earlier && row.earlier.mean, text: row => row.earlier && isKnown(row.earlier.mean) ? signed(row.earlier.mean) : '–', more: row => row.earlier && row.earlier.photos ? interval(row.earlier, signed) + ', ' + row.earlier.photos + ' photos' : ''}] : [];
  return [
    {key: 'label', title: 'Model', value: row => row.label, text: row => row.label},
    ...scored,
    ...earlier,
    {key: 'valid', title: 'Valid', value: row => row.valid, text: row => isKnown(row.valid) ? percent(row.valid) : '–'},
    {key: 'latency', title: 'Latency', value: row => row.latency, text: row => isKnown(row.latency) ? number(row.latency, 2) + ' s' : '–', more: row => isKnown(row.latency_p95) ? 'p95 ' + number(row.latency_p95, 2) + ' s' : ''},
    {key: 'tokens', title: 'Tokens', value: row => row.tokens_out, text: row => number(row.tokens_out, 0), more: row => isKnown(row.tokens_in) ? number(row.tokens_in, 0) + ' in' : ''},
    {key: 'cost', title: 'Cost per photo', value: row => row.cost, text: row => dollars(row.cost)},
    {key: 'per-cent', title: 'Reward per cent', value: row => row.reward_per_cent, text: row => number(row.reward_per_cent, 1)},
  ];
}

/** Draws the value. */
function draw() {
  const data = props.value || null;
  find('eval-empty').hidden = Boolean(data);
  find('eval').hidden = !data;
  if (data) {
    if (data.id !== shown) resetControls(data);
    find('eval').dataset.state = data.state;
    setText(find('eval-name'), data.name);
    setText(find('eval-badge'), data.badge);
    setText(find('eval-summary'), data.summary);
    showText(find('eval-message'), data.message);
    drawProgress(data.progress);
    drawActions(data.actions);
    drawSelects(data);
    drawTable(data);
    drawPlot(data);
  } else shown = null;
  document.dispatchEvent(new CustomEvent('evaluation-drawn', {detail: data && data.table.photos ? {
    evaluation: data.id, stamp: JSON.stringify([data.id, data.version]), running: Boolean(data.progress), labels: data.table.rows.map(row => row.label)} : null}));
}

/** Resets the rename form and Delete when another evaluation is displayed. */
function resetControls(data) {
  shown = data.id;
  sort = {key: data.rewards.length ? 'reward' : 'valid', down: true};
  find('eval-rename').hidden = true;
  resetDelete();
}

/** Draws the progress of an evaluation that has not ended. */
function drawProgress(progress) {
  find('eval-progress').hidden = !progress;
  if (!progress) return;
  const bar = find('eval-bar'), known = isKnown(progress.fraction);
  bar.classList.toggle('indeterminate', !known);
  bar.style.setProperty('--fraction', known ? progress.fraction : 1);
  if (known) bar.setAttribute('aria-valuenow', Math.round(progress.fraction * 100)); else bar.removeAttribute('aria-valuenow');
  bar.setAttribute('aria-valuetext', progress.text);
  setText(find('eval-phase'), progress.text);
  setText(find('eval-left'), progress.left || '');
}

/** Shows the buttons whose actions are possible; those that the visitor may not use are disabled, with the reason. */
function drawActions(actions) {
  for (const button of buttons) {
    const reason = actions[button.dataset.action];
    button.hidden = reason === undefined;
    button.disabled = Boolean(reason);
  }
  find('eval-downloads').hidden = actions.export === undefined;
  showText(find('eval-note'), Object.values(actions).filter(Boolean).join(' '));
}

/** Fills the choices of the reference and of the evaluation to compare with. */
function drawSelects(data) {
  const scored = data.rewards.length > 0;
  find('eval-board').hidden = !data.table.photos;
  find('eval-reference').parentElement.hidden = !scored;
  fillSelect(find('eval-reference'), data.table.rows.map((row, index) => [String(index), row.label]), String(data.table.reference));
  find('eval-compare-label').hidden = !scored || !data.earlier.length;
  fillSelect(find('eval-compare'), [['', 'nothing'], ...data.earlier.map(item => [item.id, item.name])], data.compare);
}

/** Fills a select unless it has these options already, so that an open one stays open. */
function fillSelect(select, options, value) {
  const key = JSON.stringify(options);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    select.replaceChildren(...options.map(([id, text]) => { const option = createNode('option', '', text); option.value = id; return option; }));
  }
  select.value = value;
}

/** Draws the leaderboard, sorted; rows without a value come last. */
function drawTable(data) {
  const columns = columnsOf(data), head = element.querySelector('.eval-table thead tr');
  const focused = head.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const column = columns.find(item => item.key === sort.key) || columns[0];
  head.replaceChildren(...columns.map(item => {
    const cell = createNode('th'), button = createNode('button', '', item.title);
    cell.scope = 'col';
    if (item === column) cell.setAttribute('aria-sort', sort.down ? 'descending' : 'ascending');
    button.type = 'button';
    button.dataset.key = item.key;
    cell.append(button);
    return cell;
  }));
  if (focused) head.querySelector('[data-key="' + focused + '"]')?.focus();
  const rows = data.table.rows.map(row => ({row, value: column.value(row)})).sort((a, b) => {
    if (!isKnown(a.value) || !isKnown(b.value)) return isKnown(b.value) - isKnown(a.value);
    const order = typeof a.value === 'string' ? a.value.localeCompare(b.value) : a.value - b.value;
    return sort.down ? -order : order;
  });
  element.querySelector('.eval-table tbody').replaceChildren(...rows.map(({row}) => {
    const line = createNode('tr', row.kind);
    columns.forEach((item, index) => {
      const cell = createNode(index ? 'td' : 'th', '', item.text(row)), more = item.more && item.more(row);
      if (!index) cell.scope = 'row';
      if (more) cell.append(createNode('small', '', more));
      line.append(cell);
    });
    return line;
  }));
  const answered = data.table.answered, total = data.table.photos * data.table.rows.filter(row => row.kind === 'model').length;
  const partial = answered < total ? ' So far ' + answered + ' of ' + total + ' photos are answered.' : '';
  setText(find('eval-about'), (data.rewards.length ? 'Reward: ' + data.reward + '. A photo counts with the best of ' + data.table.candidates + ' candidates; intervals are 95 % bootstrap intervals over photos. ' : 'Only recipes are scored. ') + 'Latency is that of a call for one photo.' + partial);
}

/** Creates an SVG element. */
function createShape(tag, attributes, text) {
  const shape = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  if (text !== undefined) shape.textContent = text;
  return shape;
}

/** Draws reward against latency or cost, with the Pareto front: the models that no other beats in both. */
function drawPlot(data) {
  const models = data.table.rows.filter(row => row.kind === 'model' && isKnown(row.reward.mean));
  const points = models.filter(row => isKnown(row[axis]));
  find('eval-plot').hidden = !data.rewards.length || !models.length;
  setText(find('plot-title'), axis);
  element.querySelectorAll('.plot-axis button').forEach(button => button.setAttribute('aria-pressed', String(button.dataset.axis === axis)));
  const reason = axis === 'cost' ? 'The cost is not known. Enter what this machine costs in the Usage tab, or compare hosted models.' : 'No call has been timed yet.';
  showText(find('plot-note'), points.length ? '' : reason);
  find('plot').hidden = !points.length;
  if (!points.length) return;
  const width = Math.max(280, find('plot').clientWidth || 640), height = 260, left = 52, right = 24, top = 14, bottom = 40;
  const references = data.table.rows.filter(row => row.kind === 'reference' && isKnown(row.reward.mean));
  const lows = [...points.map(row => row.reward.low), ...references.map(row => row.reward.mean)];
  const highs = [...points.map(row => row.reward.high), ...references.map(row => row.reward.mean)];
  const min = Math.min(...lows), max = Math.max(...highs, min + 0.01), end = Math.max(...points.map(row => row[axis]), 1e-9) * 1.15;
  const x = value => left + value / end * (width - left - right), y = value => height - bottom - (value - min) / (max - min) * (height - top - bottom);
  const svg = createShape('svg', {viewBox: '0 0 ' + width + ' ' + height, width: width, height: height, role: 'img'});
  const format = axis === 'cost' ? dollars : value => number(value, 2) + ' s';
  svg.setAttribute('aria-label', 'Reward against ' + axis + ': ' + points.map(row => row.label + ' ' + number(row.reward.mean, 3) + ' at ' + format(row[axis])).join('; '));
  for (let step = 0; step <= 4; step++) {
    const reward = min + (max - min) * step / 4, share = end * step / 4;
    svg.append(createShape('line', {x1: left, x2: width - right, y1: y(reward), y2: y(reward), class: 'grid-line'}), createShape('text', {x: left - 8, y: y(reward) + 4, 'text-anchor': 'end'}, reward.toFixed(2)), createShape('text', {x: x(share), y: height - bottom + 18, 'text-anchor': 'middle'}, format(share)));
  }
  for (const row of references) svg.append(createShape('line', {x1: left, x2: width - right, y1: y(row.reward.mean), y2: y(row.reward.mean), class: 'reference-line'}), createShape('text', {x: left + 4, y: y(row.reward.mean) - 4}, row.label));
  const front = points.filter(row => !points.some(other => other !== row && other[axis] <= row[axis] && other.reward.mean >= row.reward.mean && (other[axis] < row[axis] || other.reward.mean > row.reward.mean))).sort((a, b) => a[axis] - b[axis]);
  svg.append(createShape('polyline', {points: front.map(row => x(row[axis]) + ',' + y(row.reward.mean)).join(' '), class: 'front'}));
  let below = -Infinity;  // where the previous label stands: labels do not cover each other
  for (const row of [...points].sort((a, b) => b.reward.mean - a.reward.mean)) {
    const across = x(row[axis]), up = y(row.reward.mean), flip = across > width * 0.6;
    below = Math.max(up + 4, below + 14);
    const dot = createShape('circle', {cx: across, cy: up, r: 6, class: front.includes(row) ? 'dot on-front' : 'dot'});
    dot.append(createShape('title', {}, row.label + ': ' + number(row.reward.mean, 3) + ' at ' + format(row[axis])));
    svg.append(createShape('line', {x1: across, x2: across, y1: y(row.reward.low), y2: y(row.reward.high), class: 'whisker'}), dot, createShape('text', {x: across + (flip ? -11 : 11), y: below, 'text-anchor': flip ? 'end' : 'start', class: 'dot-label'}, row.label));
  }
  find('plot').replaceChildren(svg);
}

/** Lets Delete show its first label again. */
function resetDelete() {
  clearTimeout(confirmTimer);
  confirmTimer = null;
  setText(buttons.find(button => button.dataset.action === 'delete'), 'Delete');
}

/** Executes the action of a button. Delete needs a second click; Rename opens its form. */
function act(button) {
  const action = button.dataset.action;
  if (action === 'rename') {
    find('eval-rename').hidden = false;
    find('eval-new-name').value = find('eval-name').textContent;
    find('eval-new-name').focus();
  } else if (action === 'delete' && confirmTimer === null) {
    setText(button, 'Really delete?');
    confirmTimer = setTimeout(resetDelete, CONFIRM_MS);
  } else {
    resetDelete();
    trigger('act', {evaluation: shown, action: action});
  }
}

element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.action) act(button);
  else if (button.dataset.format) trigger('download', {evaluation: shown, format: button.dataset.format, reference: Number(find('eval-reference').value)});
  else if (button.dataset.axis) { axis = button.dataset.axis; drawPlot(props.value); }
  else if (button.dataset.key) {
    sort = {key: button.dataset.key, down: sort.key === button.dataset.key ? !sort.down : button.dataset.key !== 'label'};
    drawTable(props.value);
  } else if (button.matches('.eval-rename-cancel')) find('eval-rename').hidden = true;
});
element.addEventListener('submit', event => {
  event.preventDefault();
  find('eval-rename').hidden = true;
  trigger('act', {evaluation: shown, action: 'rename', name: find('eval-new-name').value});
});
element.addEventListener('change', event => {
  if (!event.target.matches('select')) return;
  trigger('options', {reference: Number(find('eval-reference').value), compare: find('eval-compare').value});
});
new ResizeObserver(() => { if (props.value) drawPlot(props.value); }).observe(find('eval'));
watch('value', draw);
draw();
