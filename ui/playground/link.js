// Writes the page's settings into its address. link.py reads them back and checks them.
(...values) => {
  const query = new URLSearchParams();
  NAMES.forEach((name, place) => {
    const value = values[place];
    if (value !== null && value !== undefined && value !== '' && String(value) !== '') query.set(name, value);
  });
  const weights = REWARDS.map((name, place) => [name, values[NAMES.length + place]]).filter(([, weight]) => weight > 0);
  if (weights.length) query.set('reward', weights.map(([name, weight]) => name + ':' + weight).join(','));
  const words = query.toString().replaceAll('%3A', ':').replaceAll('%2C', ',');
  clearTimeout(window.playgroundLink);
  const write = () => history.replaceState(history.state, '', location.pathname + '?' + words);
  if (!NOW) { window.playgroundLink = setTimeout(write, 250); return []; }   // browsers limit how often this may be called
  write();
  return navigator.clipboard ? navigator.clipboard.writeText(location.href).then(() => 'Link copied', () => 'It is in the address bar')
                             : 'It is in the address bar';
}
