// Draws a page of photos with the best candidate of each model from props.value. Text is inserted with textContent only.

const WAIT_MS = 300, RUNNING_MS = 5000;  // after a change; between two updates while the evaluation works
const find = name => element.querySelector('.' + name);
let current = null;    // the evaluation that the view displays: {evaluation, stamp, running, labels}
let requested = null;  // the stamp that was last requested
let page = 0, timer = null, lastTime = 0;

/** Requests the photos that the controls describe. */
function request() {
  if (!current) return;
  requested = current.stamp;
  lastTime = Date.now();
  trigger('show', {evaluation: current.evaluation, stamp: current.stamp, order: find('shots-order').value, a: Number(find('shots-a').value), b: Number(find('shots-b').value), page: page});
}

/** Requests the photos again when the leaderboard has changed: soon, but not at every step of a slider. */
document.addEventListener('evaluation-drawn', event => {
  const changed = !current || !event.detail || current.evaluation !== event.detail.evaluation;
  current = event.detail;
  find('shots').hidden = !current;
  if (!current) return;
  if (changed) { page = 0; lastTime = 0; fillSelects(current.labels); }
  if (current.stamp === requested && !changed) return;
  clearTimeout(timer);
  const wait = current.running ? Math.max(WAIT_MS, lastTime + RUNNING_MS - Date.now()) : WAIT_MS;
  timer = setTimeout(request, changed ? 0 : wait);
});

/** Fills the choices of the rows A and B. */
function fillSelects(labels) {
  ['a', 'b'].forEach((name, index) => {
    const select = find('shots-' + name);
    select.replaceChildren(...labels.map((label, value) => { const option = createNode('option', '', label); option.value = value; return option; }));
    select.value = String(Math.min(index, labels.length - 1));
  });
  showRows();
}

/** Shows the choices of A and B where they count. */
function showRows() {
  element.querySelectorAll('.shots-rows').forEach(label => { label.hidden = find('shots-order').value !== 'loses'; });
}

/** Draws the value. */
function draw() {
  const data = props.value;
  if (!data || !current || data.evaluation !== current.evaluation) return;
  page = data.page;
  element.querySelector('.shots-order option[value=loses]').disabled = !data.scored;
  find('shots-count').textContent = data.count + ' photo' + (data.count === 1 ? '' : 's');
  find('shots-page').textContent = (data.page + 1) + ' of ' + data.pages;
  find('shots-pages').hidden = data.pages < 2;
  find('shots-none').hidden = data.count > 0;
  find('shots-scroll').hidden = !data.count;
  const heads = ['Photo', ...data.labels.slice(0, data.models)].map(label => createNode('th', '', label));
  heads.forEach(head => { head.scope = 'col'; });
  element.querySelector('.shots-table thead tr').replaceChildren(...heads);
  element.querySelector('.shots-table tbody').replaceChildren(...data.photos.map(photo => drawPhoto(photo, data)));
}

/** Creates the row of a photo. The highest total is marked. */
function drawPhoto(photo, data) {
  const row = createNode('tr'), best = Math.max(...photo.cells.map(cell => cell.total === null ? -1 : cell.total));
  const head = createNode('th');
  head.scope = 'row';
  head.append(drawPicture(photo.src, 'The photo ' + photo.name), drawCaption(photo.total, photo.name));
  row.append(head, ...photo.cells.map((cell, model) => {
    const node = createNode('td'), button = createNode('button', 'shot');
    button.type = 'button';
    button.dataset.photo = photo.index;
    button.dataset.model = model;
    button.title = 'Open the comparison in the Playground';
    if (data.models > 1 && cell.total !== null && cell.total === best) button.classList.add('best');
    button.append(...(cell.src ? [drawPicture(cell.src, data.labels[model] + ': ' + cell.text)] : []), drawCaption(cell.total, cell.text));
    node.append(button);
    return node;
  }));
  return row;
}

/** Creates a picture. */
function drawPicture(src, alt) {
  const image = createNode('img');
  image.src = src;
  image.alt = alt;
  image.loading = 'lazy';
  return image;
}

/** Creates a total and a text. */
function drawCaption(total, text) {
  const caption = createNode('span', 'shot-caption');
  if (total !== null) caption.append(createNode('b', '', total.toFixed(3)), ' ');
  caption.append(createNode('span', '', text));
  return caption;
}

element.addEventListener('change', event => {
  if (!event.target.matches('select')) return;
  showRows();
  page = 0;
  request();
});
element.addEventListener('click', event => {
  const shot = event.target.closest('.shot');
  if (shot) trigger('open', {evaluation: current.evaluation, photo: Number(shot.dataset.photo), model: Number(shot.dataset.model)});
  else if (event.target.closest('.shots-previous') && page > 0) { page -= 1; request(); }
  else if (event.target.closest('.shots-next') && page + 1 < props.value.pages) { page += 1; request(); }
});
watch('value', draw);
