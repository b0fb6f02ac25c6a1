// Numbers as text.

export const fixed3 = (number) => number.toFixed(3);
export const upperBound = (number) => (number < 0.0005 ? "<0.001" : `≤${fixed3(number)}`);
export const plural = (count, one, several = `${one}s`) => `${count} ${count === 1 ? one : several}`;
