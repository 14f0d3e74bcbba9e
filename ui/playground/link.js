/* Creates the event handler that writes the settings to the page's URL; link.py calls it and parses the URL. */
(fields, rewards, maxLength, copy) => (...values) => {
  const query = new URLSearchParams();
  fields.forEach((name, index) => {
    if (String(values[index] ?? '') !== '') query.set(name, values[index]);
  });
  const weights = rewards.map((name, index) => [name, values[fields.length + index]]).filter(([, weight]) => weight > 0);
  if (weights.length) query.set('reward', weights.map(([name, weight]) => name + ':' + weight).join(','));
  const isTooLong = query.toString().length > maxLength;
  if (isTooLong) query.delete('prompt');
  const search = query.toString().replaceAll('%3A', ':').replaceAll('%2C', ',');
  const write = () => history.replaceState(history.state, '', location.pathname + '?' + search);
  document.dispatchEvent(new CustomEvent('playground-settings'));
  clearTimeout(window.playgroundLink);
  if (!copy) { window.playgroundLink = setTimeout(write, 250); return []; }   // browsers limit the rate of replaceState
  write();
  const failed = 'Copy it from the address bar';
  const copied = isTooLong ? 'Link copied without the prompt, which is too long' : 'Link copied';
  return navigator.clipboard ? navigator.clipboard.writeText(location.href).then(() => copied, () => failed) : failed;
}
